"""Results do not depend on torch's default dtype or device."""

import contextlib
from itertools import product

import pytest
import torch
from methods import METHODS, SPECS, behavior, handling
from models import data_of
from networks import Case
from products import thinned

from lora_init import LoraConfig, get_peft_model
from lora_init.quantization import codebooks


@contextlib.contextmanager
def default(setting):
    if setting == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(setting)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def factors(method, kind, base, setting):
    case = Case(kind)
    config = LoraConfig(r=4, target_modules=list(case.shapes), init_lora_weights=method)
    data = data_of(SPECS[method], case.calibration())
    with default(setting):
        model = get_peft_model(base, config, calibration=data, cache=False)
    return {
        f"{name}.{part}": getattr(layer, part)
        for name, layer in model.layers.items()
        for part in ("lora_A", "lora_B")
    }


@pytest.mark.parametrize(
    ("method", "setting"),
    thinned(
        list(product(METHODS, [torch.float64, torch.float16, "meta"])),
        lambda method, setting: behavior(method),
        lambda method, setting: (setting, handling(method)),
    ),
    ids=str,
)
def test_every_method_gives_the_same_factors(method, setting):
    spec = SPECS[method]
    kinds = [kind for kind in ("Linear", "Embedding") if kind in spec.module_types]
    for kind in kinds[: 1 if "weights" in spec.needs else 2]:
        codebooks.table_of.cache_clear()
        wanted = factors(spec.name, kind, Case(kind).build(), torch.float32)
        codebooks.table_of.cache_clear()
        found = factors(spec.name, kind, Case(kind).build(), setting)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], value), name
