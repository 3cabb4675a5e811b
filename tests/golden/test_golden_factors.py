"""Every method's factors equal those that commit 1d1a888 computed."""

from __future__ import annotations

import functools
import shutil

import golden_networks as golden
import pytest
import torch

from lora_init import LoraModel

CASES = golden.read_json("factors")
SENSITIVE = 3e-5

CHANGED = dict.fromkeys(
    [case for case in CASES if case.startswith("quantizer_uniform_block_size_16_loftq")],
    "Scales of `uniform` and of double quantization come from means in float64.",
)
"""Cases that CHANGELOG.md changed on purpose, with its reason. They agree to `SENSITIVE`, because
the last bit of a scale turns the singular vectors of a quantization error."""


@functools.cache
def stored() -> dict[str, dict[str, torch.Tensor]]:
    """The golden tensors by case."""
    cases: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in golden.read("factors").items():
        case, _, name = key.partition("/")
        cases.setdefault(case, {})[name] = value
    return cases


@pytest.mark.parametrize("case", CASES)
def test_factors_equal_the_stored_ones(case):
    check(case, golden.start(CASES[case]))


@pytest.mark.parametrize("case", ["pissa-dense-3", "corda-dense-3"])
def test_entries_of_an_old_cache_do_no_harm(case, tmp_path, monkeypatch):
    folder = shutil.copytree(golden.DATA / "cache", tmp_path / "cache")
    monkeypatch.setenv("LORA_INIT_CACHE", str(folder))
    check(case, golden.start(CASES[case], cache=True))


def check(case: str, model: LoraModel) -> None:
    """Compare scalings, factors, their products and the stored bases."""
    expected = dict(stored()[case])
    found, bases = golden.factors(model), golden.bases(model)
    limit = SENSITIVE if case in CHANGED else golden.tolerance()
    scalings = {target.name: target.scaling for target in model.plan.targets}
    assert scalings == pytest.approx(CASES[case]["scalings"], rel=1e-12)
    for name in [key for key in expected if key.endswith(".base")]:
        golden.assert_close(bases[name.removesuffix(".base")], expected.pop(name), name, limit)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        golden.assert_close(found[name], value, name, limit)
    for layer, scaling in scalings.items():
        now, then = (
            scaling * part[f"{layer}.lora_B"].double() @ part[f"{layer}.lora_A"].double()
            for part in (found, expected)
        )
        # Orthogonal factors have a product of zero, up to rounding.
        norms = [expected[f"{layer}.{name}"].double().norm() for name in ("lora_A", "lora_B")]
        size = max(then.norm(), 0.1 * scaling * norms[0] * norms[1])
        assert (now - then).norm() <= limit * size, f"s B A of {layer}"
    if model.plan.initializer.base == "keep":
        original = golden.network(CASES[case]["network"])
        for layer, weight in bases.items():
            assert torch.equal(weight, original.get_submodule(layer).weight), layer
