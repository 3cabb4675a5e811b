"""Models with bitsandbytes' modules, and what is particular about these."""

import copy

import pytest
import torch
from torch import nn

from lora_init.weights.kinds import is_quantized, known_format


def kept_plain(model):
    """A copy whose 4-bit modules bitsandbytes does not repack: what an adapter's base computes.

    The repacked module computes in bfloat16, from scales that are rounded to it.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if is_quantized(module):
            known_format(module).keep_plain(module)
    return twin


def on_device(model, device):
    """`model.to(device)`, and what it leaves behind: the scales of weights quantised to 8 bits.

    bitsandbytes hangs codes and scales on a new parameter, of which torch takes the data only.
    """
    model.to(device)
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt" and module.weight.CB is not None:
            weight = module.weight
            weight.CB, weight.SCB = weight.data, weight.SCB.to(device)
    return model


def packed(model, kind, skip=("lm_head", "classifier")):
    """Exchange the linear layers for bitsandbytes' own, as transformers does when it loads a model.

    Args:
        kind: "nf4", "fp4", either with " double", or "int8". 4-bit modules are kept from repacking,
            which rounds their scales on some CPUs.
        skip: last parts of the names of layers that stay as they are.
    """
    modules = pytest.importorskip("bitsandbytes.nn")
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or path.rpartition(".")[2] in skip:
            continue
        sizes, bias = (module.in_features, module.out_features), module.bias is not None
        if kind == "int8":
            new = modules.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
        else:
            name, *double = kind.split()
            new = modules.Linear4bit(
                *sizes, bias=bias, compute_dtype=torch.float32, quant_type=name,
                compress_statistics=bool(double),
            )  # fmt: skip
        new.load_state_dict(module.state_dict())
        new = new.to("cpu").requires_grad_(False).eval()
        known_format(new).keep_plain(new)
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    setattr(model, f"is_loaded_in_{'8' if kind == 'int8' else '4'}bit", True)  # what PEFT looks at
    return model
