"""What the cache gives is what would have been computed, for every rank and scaling it serves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_init import LoraConfig, cached_factors, get_peft_model, initialization, statistics
from lora_init.cache import default_cache


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_INIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def computed(monkeypatch):
    """Names of the layers that were computed, and not taken from the cache."""
    names = []
    original = initialization._Worker._computed

    def counting(self, targets, inputs):
        names.extend(target.name for target in targets)
        return original(self, targets, inputs)

    monkeypatch.setattr(initialization._Worker, "_computed", counting)
    return names


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 70))


def batches(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, 60, generator=generator) for _ in range(3)]


def started(method, *, rank: int = 4, alpha: float = 8.0, base=None, data=None, **settings):
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["0", "2"], init_lora_weights=method
    )
    return get_peft_model(
        network() if base is None else base,
        config,
        calibration=batches() if data is None else data,
        **settings,
    )


def products(model) -> dict[str, torch.Tensor]:
    return {
        name: layer.scaling * (layer.lora_B @ layer.lora_A).detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }


def assert_same(first, second) -> None:
    assert products(first).keys() == products(second).keys()
    for name, product in products(first).items():
        torch.testing.assert_close(product, products(second)[name], rtol=0, atol=1e-6)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


NESTING = ["pissa", "corda", {"name": "corda", "corda_method": "kpm"}, "eva"]


@pytest.mark.parametrize("method", NESTING, ids=str)
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


@pytest.mark.parametrize("method", NESTING, ids=str)
@pytest.mark.parametrize(("rank", "alpha"), [(4, 1.0), (9, 8.0), (16, 32.0), (2, 2.0)])
def test_one_decomposition_serves_smaller_ranks_and_every_scaling(method, rank, alpha, computed):
    if method == "eva":  # its allocation is another for each rank; here none
        method = {"name": "eva", "rho": 1.0}
    started(method, rank=16)
    computed.clear()
    cached = started(method, rank=rank, alpha=alpha)
    assert computed == []
    assert_same(cached, started(method, rank=rank, alpha=alpha, cache=False))


def test_ranks_of_one_power_of_two_share_whichever_comes_first(computed):
    started("pissa", rank=3)
    computed.clear()
    cached = started("pissa", rank=14)
    assert computed == []
    assert_same(cached, started("pissa", rank=14, cache=False))
    computed.clear()
    started("pissa", rank=20)
    assert sorted(computed) == ["0", "2"]


def test_another_weight_option_or_input_is_another_entry(computed):
    started("pissa")
    started("corda")
    changed = network()
    with torch.no_grad():
        changed[2].weight[0, 0] += 1e-6
    for settings, expected in (
        ({"method": "pissa", "base": changed}, ["2"]),
        ({"method": {"name": "pissa", "method": "exact"}}, ["0", "2"]),
        ({"method": "corda", "data": batches(seed=2)}, ["0", "2"]),
        ({"method": {"name": "corda", "damping": 0.01}}, ["0", "2"]),
    ):
        computed.clear()
        started(**settings)
        assert sorted(computed) == expected


@pytest.mark.parametrize("method", ["gaussian", "olora", "pissa_niter_2", "loftq"])
def test_methods_that_promise_no_nesting_keep_nothing(method):
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
    nesting = cached_factors.Nesting(version=99)
    monkeypatch.setattr(initialization._Worker, "_nesting", nesting)
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
    original = statistics._collect_inputs

    def counting(*arguments):
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(statistics, "_collect_inputs", counting)
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
