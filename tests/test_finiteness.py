"""Non-finite weights are found wherever they are looked for: at once, or beside other work."""

import pytest
import torch
from measures import assert_unchanged, snapshot
from simulated_device import Stream, simulated_cuda
from torch import nn

from lora_init import LoraConfig, get_peft_model
from lora_init.initialize import jobs
from lora_init.linalg import finite
from lora_init.linalg.finite import is_finite, refused_beside


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_is_enough(dtype, value):
    numbers = torch.randn(7, 33).to(dtype)
    assert is_finite(numbers)
    numbers[6, 32] = value
    assert not is_finite(numbers)


def test_a_sum_beyond_the_range_is_no_infinity():
    largest = torch.full((64, 64), torch.finfo(torch.float32).max)
    assert torch.isinf(largest.sum())
    assert is_finite(largest)


@pytest.fixture(params=["at once", "beside"])
def looks(request, monkeypatch):
    """Whether there is a thread for it."""
    if request.param == "beside":
        monkeypatch.setattr(finite, "POOLED", 1)
    return request.param


def test_the_first_bad_weight_is_named_after_the_body(looks):
    weights = {name: torch.ones(4, 4) for name in "abc"}
    weights["b"][0, 0] = weights["c"][3, 3] = float("nan")
    ran = False
    with (
        pytest.raises(ValueError, match=r"target 'b': its weight holds NaN or infinite values"),
        refused_beside(weights),
    ):
        ran = True
    assert ran == (looks == "beside")  # at once: before anything else is done


def test_a_body_can_wait_before_it_changes_anything(monkeypatch):
    monkeypatch.setattr(finite, "POOLED", 1)
    with refused_beside({"a": torch.ones(4, 4)}) as looked_at:
        looked_at()
    reached = []

    def body():
        weights = {"a": torch.ones(4, 4), "b": torch.full((2, 2), torch.inf)}
        with refused_beside(weights) as looked_at:
            reached.append("drawn")
            looked_at()
            reached.append("changed")

    with pytest.raises(ValueError, match="target 'b'"):
        body()
    assert reached == ["drawn"]


def test_a_thread_looks_at_weights_that_are_written(monkeypatch):
    """It has the default stream, on which another stream's writes may still be missing."""
    events = []
    monkeypatch.setattr(finite, "POOLED", 1)
    monkeypatch.setattr(finite, "is_finite", lambda values: not events.append("read"))
    monkeypatch.setattr(Stream, "synchronize", lambda stream: events.append("waited"))
    with simulated_cuda():
        weights = {name: torch.ones(4, 4, device="cuda") for name in "ab"}
        with refused_beside(weights):
            pass
        assert events == ["waited", "read", "read"]
        model = nn.Linear(8, 8, device="cuda")
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
        events.clear()
        monkeypatch.setattr(jobs, "run", lambda worker, own: events.append("read") or [])
        with pytest.raises(KeyError):
            get_peft_model(nn.Sequential(model), config, device="cpu")
    assert events == ["waited", "read"]


def test_an_error_of_the_body_is_its_own(looks):
    with pytest.raises(KeyError, match="mine"), refused_beside({"a": torch.ones(2)}):
        raise KeyError("mine")
    assert torch.get_num_threads() == 1  # as the tests set it


@pytest.mark.parametrize("method", ["kaiming", "gaussian", "orthogonal"])
def test_a_method_that_reads_no_weight_refuses_a_bad_one(method, looks):
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 6))
    with torch.no_grad():
        model[1].weight[3, 4] = float("inf")
    before = snapshot(model)
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=method)
    with pytest.raises(ValueError, match=r"target '1': its weight holds NaN or infinite values"):
        get_peft_model(model, config)
    assert_unchanged(model, before)
    model[1].weight.data[3, 4] = 0.0
    assert set(get_peft_model(model, config).layers) == {"0", "1"}
