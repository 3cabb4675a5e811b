"""Autocast and reduced float32 products change no factor, merged weight or restored base."""

import copy
from types import SimpleNamespace

import pytest
import torch
from methods import METHODS, SPECS, across, behavior, one_of_each
from models import data_of
from networks import Case
from torch.utils._python_dispatch import TorchDispatchMode
from uniform import uniform

from lora_init import LoraConfig, calibrate, get_peft_model, linalg
from lora_init.linalg import cores
from lora_init.linalg.precision import full_precision

pytestmark = pytest.mark.sampled(3)

CASE = Case()


def config_of(method):
    settings = uniform(method)
    return LoraConfig(
        r=4, target_modules=list(CASE.shapes), init_lora_weights={"name": method, **settings}
    )


def statistics_of(method, base):
    data = data_of(SPECS[method], CASE.calibration())
    return None if data is None else calibrate(base, [config_of(method)], data)


def state_of(model):
    return {name: value.clone() for name, value in model.base_model.state_dict().items()}


def life(method, base, found):
    """Return the state of a model with an adapter: at the start, merged, unmerged, unloaded."""
    model = get_peft_model(
        copy.deepcopy(base), config_of(method), calibration=found, keep_original=True, cache=False
    )
    stations = [state_of(model)]
    model.merge_adapter()
    stations.append(state_of(model))
    model.unmerge_adapter()
    stations.append(state_of(model))
    stations.append(model.unload().state_dict())
    return stations


@pytest.mark.parametrize(
    ("method", "alone"), [*across(METHODS, [False], group=behavior), ("pissa", True)]
)
def test_autocast_changes_nothing(method, alone, monkeypatch):
    """Both for small layers, with one thread each, and for large ones, with all threads."""
    monkeypatch.setattr(cores, "ALONE", 0 if alone else cores.ALONE)
    base = CASE.build()
    found = statistics_of(method, base)
    plain = life(method, base, found)
    with torch.autocast("cpu", torch.bfloat16):
        cast = life(method, base, found)
    for station, expected in zip(cast, plain, strict=True):
        for name, value in expected.items():
            assert torch.equal(station[name], value), name


@pytest.mark.parametrize("method", ["eva", "lora_ga"])
def test_statistics_are_summed_in_their_own_precision(method):
    """The model's own pass may round its activations; their sums are not rounded."""
    base = CASE.build()
    name = next(iter(CASE.shapes))  # its inputs are the batches themselves
    plain = calibrate(base, [config_of(method)], CASE.calibration())
    with torch.autocast("cpu", torch.bfloat16):
        cast = calibrate(base, [config_of(method)], CASE.calibration())
    one, other = plain.layers[name], cast.layers[name]
    if method == "eva":
        assert torch.equal(other.inputs.second_moment, one.inputs.second_moment)
    else:  # through a backward pass in 16 bits
        torch.testing.assert_close(other.gradient, one.gradient, rtol=0.1, atol=1e-3)


class Float32Products(TorchDispatchMode):
    """Records the rounding settings of all float32 products while it is active."""

    PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "linalg_qr", "_linalg_eigh")

    def __init__(self):
        super().__init__()
        self.settings = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result
        if function.overloadpacket.__name__ in self.PRODUCTS and first.dtype == torch.float32:
            self.settings.add(rounding_of_products())
        return result


def rounding_of_products():
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return tuple(backend.fp32_precision for backend in backends)


@pytest.fixture
def reduced_products():
    """Set TF32 on a GPU and bfloat16 on a CPU, as a training script might."""
    torch.set_float32_matmul_precision("medium")
    yield rounding_of_products()
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("method", one_of_each(METHODS, behavior))
def test_reduced_float32_products_are_not_used(method, reduced_products):
    """This holds for factors, merged weights and restored bases."""
    base = CASE.build()
    found = statistics_of(method, base)
    assert "ieee" not in reduced_products
    with Float32Products() as products:
        life(method, base, found)
    assert products.settings <= {("ieee", "ieee")}
    assert rounding_of_products() == reduced_products


@pytest.mark.parametrize("function", ["top_singular", "bottom_singular", "top_eigen", "leading_qr"])
def test_linear_algebra_by_itself_is_exact(function, reduced_products):
    matrix = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    matrix = matrix @ matrix.T if "eigen" in function else matrix
    with Float32Products() as products:
        getattr(linalg, function)(matrix, 3)
    assert products.settings <= {("ieee", "ieee")}


def test_an_error_restores_the_users_setting(reduced_products):
    inside = []

    @full_precision()
    def interrupted():
        with full_precision():
            inside.append(rounding_of_products())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert inside == [("ieee", "ieee")]
    assert rounding_of_products() == reduced_products


def test_training_keeps_the_users_setting(reduced_products):
    model = get_peft_model(CASE.build(), config_of("kaiming"), cache=False)
    with Float32Products() as products:
        model(CASE.inputs()).sum().backward()
    assert products.settings == {reduced_products}


def test_versions_of_torch_without_precision_settings(monkeypatch):
    """Before 2.9 there is one switch for CUDA and none for the CPU."""
    matmul = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace())
    with full_precision():
        assert matmul.allow_tf32 is False
    assert matmul.allow_tf32 is True
