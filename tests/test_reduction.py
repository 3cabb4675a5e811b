"""Where tensors go before the ranks of a process group add them up."""

import pytest
import torch
from torch import distributed

from lora_init.distributed import _place


class Somewhere:
    """Stands for a tensor on a device that this machine need not have."""

    def __init__(self, device):
        self.device = torch.device(device)


@pytest.mark.parametrize(
    ("backends", "device", "place"),
    [
        ("cpu:gloo,cuda:gloo", "cpu", "cpu"),
        ("cpu:gloo,cuda:gloo", "cuda:3", "cuda:3"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cuda:nccl", "cpu", "cuda:1"),
        ("cuda:nccl", "cuda:3", "cuda:3"),  # not the current device, which is 1
    ],
)
@pytest.mark.wrong_types
def test_a_tensor_moves_only_where_its_device_is_not_reduced(monkeypatch, backends, device, place):
    monkeypatch.setattr(distributed, "get_backend_config", lambda: backends)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert _place(Somewhere(device)) == torch.device(place)
