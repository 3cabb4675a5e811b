"""A cached start equals a computed one, at every rank and scaling."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from products import every_pair
from simulated_device import simulated_cuda
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from lora_init import LoraConfig, get_peft_model, list_initializers
from lora_init.cache import default_cache
from lora_init.calibration import collect
from lora_init.initialize import cached as cached_factors
from lora_init.initialize import run


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_INIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def computed(monkeypatch):
    """Names of the layers that were computed, and not taken from the cache."""
    names = []
    original = run._Worker._computed

    def counting(self, targets, inputs):
        names.extend(target.name for target in targets)
        return original(self, targets, inputs)

    monkeypatch.setattr(run._Worker, "_computed", counting)
    return names


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 70))


def batches(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, 60, generator=generator) for _ in range(3)]


def started(
    method, *, rank: int = 4, alpha: float = 8.0, base=None, data=None, lora=(), **settings
):
    fields = {"target_modules": ["0", "2"], "init_lora_weights": method, **dict(lora)}
    config = LoraConfig(r=rank, lora_alpha=alpha, **fields)
    return get_peft_model(
        network() if base is None else base,
        config,
        calibration=batches() if data is None else data,
        **settings,
    )


def assert_same(first, second) -> None:
    """Equal to the last bit: trained factors, bases, initial factors and the report's figures."""
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    for name, layer in first.layers.items():
        assert torch.equal(layer.base_layer.weight, second.layers[name].base_layer.weight)
        for part in ("initial_lora_A", "initial_lora_B"):
            mine, theirs = getattr(layer, part), getattr(second.layers[name], part)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
    assert figures(first) == figures(second)


def figures(model) -> dict[str, dict]:
    return {
        layer.name: {key: value for key, value in layer.details.items() if key != "from_cache"}
        for layer in model.init_report().layers
    }


WIDE_AND_NARROW = [torch.float64, torch.bfloat16, torch.float16]
CACHED = ["pissa", "milora", "mica", "corda", {"name": "corda", "corda_method": "kpm"}]


@pytest.mark.parametrize("method", CACHED, ids=str)
def test_a_second_start_computes_nothing_and_is_the_same(method, computed):
    plain = started(method, cache=False)
    first = started(method)
    computed.clear()
    second = started(method, seed=7)
    assert computed == []
    assert_same(first, plain)
    assert_same(second, plain)
    for one, other in zip(second.init_report().layers, plain.init_report().layers, strict=True):
        assert one.name == other.name


@pytest.mark.parametrize(
    ("method", "dtype", "adapter_dtype"),
    every_pair(list(product(CACHED, WIDE_AND_NARROW, [torch.float32, torch.bfloat16])), 3),
    ids=str,
)
def test_a_hit_equals_a_computation_in_every_dtype(method, dtype, adapter_dtype, computed):
    def start(**settings):
        return started(
            method,
            rank=3,
            alpha=7.0,
            base=network().to(dtype),
            data=[batch.to(dtype) for batch in batches()],
            adapter_dtype=adapter_dtype,
            **settings,
        )

    plain, first = start(cache=False), start()
    computed.clear()
    second = start()
    assert computed == []
    assert_same(first, plain)
    assert_same(second, plain)


def images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 20, 3), nn.Tanh(), nn.Conv2d(20, 6, 3), nn.Flatten())


def words() -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(50, 30), nn.Flatten(), nn.Linear(60, 40))
    with torch.no_grad():
        base[2].weight[:, 2:] = base[2].weight[:, :1]  # of rank 2: the other components vanish
    return base


@pytest.mark.parametrize(
    ("base", "method"),
    [
        *((images, method) for method in CACHED),
        *((words, method) for method in ("pissa", "milora", "mica")),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_hit_equals_a_computation_for_other_modules(base, method, computed):
    data = [torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1))]
    settings = {"rank": 3, "alpha": 5.0, "data": data}
    plain = started(method, base=base(), cache=False, **settings)
    first = started(method, base=base(), **settings)
    computed.clear()
    second = started(method, base=base(), **settings)
    assert computed == []
    assert_same(first, plain)
    assert_same(second, plain)


def test_a_partly_cached_start_equals_a_computed_one(computed):
    """As after a kill in the middle of an initialization."""
    plain = started("pissa", cache=False)
    started("pissa", lora={"target_modules": ["0"]})
    computed.clear()
    assert_same(started("pissa"), plain)
    assert computed == ["2"]


SPECS = {spec.name: spec for spec in list_initializers()}
READS_INPUTS = [
    name for name, spec in SPECS.items() if spec.reads & {"inputs", "gradient"} == {"inputs"}
]


@pytest.mark.parametrize("method", READS_INPUTS)
def test_cached_statistics_start_the_same_adapter(method, passes):
    sets = SPECS[method].request(SPECS[method].options()).sets
    data = {name: batches(seed=seed) for seed, name in enumerate(sets)} or None
    plain, first = started(method, data=data, cache=False), started(method, data=data)
    passes.clear()
    assert_same(first, plain)
    assert_same(started(method, data=data), plain)
    assert passes == []


def test_another_weight_option_or_input_is_another_entry(computed):
    started("pissa")
    started("corda")
    changed = network()
    with torch.no_grad():
        changed[2].weight[0, 0] += 1e-6
    for settings, expected in (
        ({"method": "pissa", "rank": 3}, ["0", "2"]),
        ({"method": "pissa", "alpha": 1.7}, ["0", "2"]),
        ({"method": "pissa", "base": changed}, ["2"]),
        ({"method": {"name": "pissa", "method": "exact"}}, ["0", "2"]),
        ({"method": "corda", "data": batches(seed=2)}, ["0", "2"]),
        ({"method": {"name": "corda", "damping": 0.01}}, ["0", "2"]),
    ):
        computed.clear()
        started(**settings)
        assert sorted(computed) == expected


@pytest.mark.parametrize("method", ["gaussian", "olora", "pissa_niter_2", "loftq"])
def test_factors_that_are_cheap_or_random_are_not_kept(method):
    started(method)
    assert default_cache().usage().entries == 0


def test_switched_off_keeps_nothing(monkeypatch, folder):
    started("pissa", cache=False)
    assert not folder.exists()
    monkeypatch.setenv("LORA_INIT_CACHE", "off")
    started("pissa")
    assert not folder.exists()


def test_a_raised_version_computes_again(monkeypatch, computed):
    started("pissa")
    computed.clear()
    monkeypatch.setitem(cached_factors.VERSIONS, "pissa", 99)
    started("pissa")
    assert sorted(computed) == ["0", "2"]


def test_a_damaged_entry_is_computed_again(folder, computed):
    plain = started("pissa")
    for path in folder.rglob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(bytes(data))
    computed.clear()
    with pytest.warns(UserWarning, match="damaged"):
        assert_same(started("pissa"), plain)
    assert sorted(computed) == ["0", "2"]


@pytest.fixture
def passes(monkeypatch):
    """How many calibration passes were made."""
    made = []
    original = collect._collect_inputs

    def counting(*arguments):
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(collect, "_collect_inputs", counting)
    return made


def test_one_pass_serves_methods_that_ask_for_the_same(passes):
    plain = started("corda", cache=False)
    passes.clear()
    first, second = started("corda"), started({"name": "corda", "damping": 0.01})
    third = started("corda", rank=8)
    assert len(passes) == 1
    assert_same(first, plain)
    assert third.init_report().calibration_tokens == second.init_report().calibration_tokens


def test_other_batches_weights_or_a_loader_are_calibrated(passes):
    started("corda")
    changed = network()
    with torch.no_grad():
        changed[0].bias[0] += 1
    started("corda", data=batches(seed=3))
    started("corda", base=changed)
    started("corda", data=iter(batches()))
    assert len(passes) == 4


def test_layers_that_share_an_input_and_not_a_width():
    """Query and key of grouped heads: one input to EVA, factors of two shapes."""

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key = nn.Linear(64, 64), nn.Linear(64, 48)

        def forward(self, x):
            return self.query(x).sum() + self.key(x).sum()

    torch.manual_seed(0)
    batches = [{"x": torch.randn(80, 64)}]
    config = LoraConfig(
        r=2, target_modules=["query", "key"], init_lora_weights="eva", eva_config={"rho": 1.0}
    )
    for _ in range(2):
        model = get_peft_model(Grouped(), config, calibration=batches)
        assert {n: layer.lora_B.shape[0] for n, layer in model.layers.items()} == {
            "query": 64, "key": 48,
        }  # fmt: skip


def test_another_device_or_torch_is_another_entry(computed, monkeypatch):
    started("pissa")
    with simulated_cuda():
        computed.clear()
        started("pissa", device="cuda")
        assert sorted(computed) == ["0", "2"]
        computed.clear()
        started("pissa", device="cuda")
        assert computed == []
    monkeypatch.setattr(torch, "__version__", "99.0")
    started("pissa")
    assert sorted(computed) == ["0", "2"]


@pytest.mark.parametrize("kind", ["offloaded", "wrapped"])
def test_a_model_whose_weights_cannot_be_hashed_is_calibrated(kind, passes):
    base = network()
    if kind == "offloaded":
        pytest.importorskip("accelerate").cpu_offload(base, execution_device="cpu")
    else:
        base[1].scale = nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    for _ in range(2):
        assert started("eva", base=copy.deepcopy(base)).layers
    assert len(passes) == 2
