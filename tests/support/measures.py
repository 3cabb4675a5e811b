"""What several tests measure of a model, and do to it in order to measure."""

import torch
from torch import nn

from lora_init.weights.kinds import oriented_weight

EPSILON = {
    torch.float32: 2e-6,  # the promised figure, not float32's epsilon
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}


@torch.no_grad()
def logits(model, batches):
    """Logits of all batches; without dropout, at unmasked positions as at masked ones."""
    model.eval()
    return [model(**batch).logits for batch in batches]


@torch.no_grad()
def without_bias(module, x):
    """W x as the module computes it, the scale of the tolerances; float64."""
    result = module(x).double()
    bias = getattr(module, "bias", None)
    if bias is None:
        return result
    return result - (bias[:, None, None] if isinstance(module, nn.Conv2d) else bias)


def norm_ratio(model, base, name):
    """max(1, ‖s B0 A0‖ / ‖W‖) of one layer: the factor in the promised tolerances."""
    layer = model.layers[name]
    if layer.initial_lora_A is None:
        return 1.0
    product = layer.scaling * layer.initial_lora_B.double() @ layer.initial_lora_A.double()
    weight = oriented_weight(base.get_submodule(name)).double()
    return max(1.0, float(product.norm() / weight.norm()))


def largest_ratio(model, base):
    return max(norm_ratio(model, base, name) for name in model.layers)


def relative_gap(actual, expected, scale=None):
    """‖actual - expected‖ / ‖scale‖ in float64; of lists: the largest."""
    if isinstance(actual, list):
        return max(relative_gap(a, e) for a, e in zip(actual, expected, strict=True))
    scale = expected if scale is None else scale
    difference = actual.detach().double() - expected.detach().double()
    return float(difference.norm() / scale.detach().double().norm())


def assert_gap(actual, expected, tolerance, scale=None):
    gap = relative_gap(actual, expected, scale)
    assert gap <= tolerance, f"relative gap {gap:.2e}, allowed {tolerance:.2e}"


def train(model, size=0.05, seed=5):
    """Move every trainable tensor by noise of `size` times its own scale: a stand-in for training.

    Zero and tiny tensors (B at step 0, a core) move by `size` times the scale of a 1/sqrt(rank)
    entry.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                scale, usual = parameter.float().pow(2).mean().sqrt(), parameter.shape[-1] ** -0.5
                scale = float(scale) if scale > 0.02 * usual else usual
                parameter.add_((size * scale * noise).to(parameter))
    return model


def snapshot(model):
    """Everything a failed call must leave alone: tensors, modules, flags, modes, hooks."""
    return {
        "state": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "modules": {n: id(m) for n, m in model.named_modules(remove_duplicate=False)},
        "flags": {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after["state"].keys() == before["state"].keys()
    for name, value in before["state"].items():
        same = after["state"][name]
        assert value.dtype == same.dtype, name
        assert torch.equal(value, same), f"{name} changed by {(value - same).abs().max():.1e}"
    for part in ("modules", "flags", "training", "hooks"):
        assert after[part] == before[part], part
