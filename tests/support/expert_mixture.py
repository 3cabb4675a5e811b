"""Small models of one layer of fused experts, and of one router, for tests of every method."""

import torch
from expert_modules import EXPERTS, HIDDEN, experts, router
from torch import nn


class Mixture(nn.Module):
    """A linear layer, a router, and experts in one of transformers' layouts."""

    def __init__(self, layout="concatenated"):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.entry = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.entry.weight.data = torch.randn(HIDDEN, HIDDEN, generator=generator) / 5
        self.experts = experts(layout)
        self.register_buffer("router", torch.randn(EXPERTS, HIDDEN, generator=generator))

    def routing(self, hidden):
        scores, indices = (hidden @ self.router.to(hidden).T).softmax(-1).topk(2)
        return indices, scores

    def forward(self, x):
        hidden = self.entry(x).reshape(-1, HIDDEN)
        indices, scores = self.routing(hidden)
        return self.experts(hidden, indices, scores).view_as(x)


class Choice(nn.Module):
    """A linear layer and a router; the outputs are its logits and its scores."""

    def __init__(self, kind="plain"):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.entry = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.entry.weight.data = torch.randn(HIDDEN, HIDDEN, generator=generator) / 5
        self.gate = router(kind)

    def forward(self, x):
        logits, scores, _ = self.gate(self.entry(x))
        return torch.cat([logits, scores.to(logits.dtype)], dim=-1)


def mixture_rows(count=3, size=40, seed=1):
    """Batches of inputs."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, HIDDEN, generator=generator) for _ in range(count)]


def reference(model, x, deltas):
    """The model's output in float64 with a delta per fused parameter, (experts, out, in)."""
    hidden = model.entry(x).reshape(-1, HIDDEN).double()
    indices, scores = model.routing(hidden)
    block = model.experts
    transposed = bool(getattr(block, "is_transposed", False))
    total = torch.zeros_like(hidden)
    for expert in range(EXPERTS):
        token, place = torch.where(indices == expert)
        rows = hidden[token]
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(block, name)[expert].double()
            weight = (weight.T if transposed else weight) + deltas[name][expert].double()
            rows = rows @ weight.T
            if (bias := getattr(block, f"{name}_bias", None)) is not None:
                rows = rows + bias[expert].double()
            if name == "gate_up_proj":
                rows = block._apply_gate(rows)
        total.index_add_(0, token, rows * scores[token, place, None])
    return total.view(x.shape)
