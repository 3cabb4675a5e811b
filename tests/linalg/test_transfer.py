"""Threads read memory only after the caller's stream has written it."""

import pytest
import torch
from simulated_device import Stream, simulated_cuda
from torch import nn

from lora_init import LoraConfig, get_peft_model
from lora_init.initialize import jobs
from lora_init.linalg.transfer import named_on_host, on_host


def test_initialization_waits_for_writes_before_threads_read(monkeypatch):
    events = []
    monkeypatch.setattr(Stream, "synchronize", lambda stream: events.append("waited"))
    monkeypatch.setattr(jobs, "run", lambda worker, own: events.append("read") or [])
    with simulated_cuda():
        model = nn.Sequential(nn.Linear(8, 8, device="cuda"))
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
        with pytest.raises(KeyError):
            get_peft_model(model, config, device="cpu")
    assert events == ["waited", "read"]


def test_numbers_of_several_dtypes_are_read_exactly():
    numbers = [torch.tensor(2**40 + 1), torch.tensor([0.1, 0.2]), torch.tensor(True)]
    assert on_host(numbers) == [number.tolist() for number in numbers]
    assert on_host([]) == []
    assert named_on_host(a=numbers[0], b=numbers[2]) == {"a": 2**40 + 1, "b": True}
