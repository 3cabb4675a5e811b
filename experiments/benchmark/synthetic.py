"""Llama models without a checkpoint, with power-law weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..errors import ConfigurationError
from .powerlaw import PowerLaw
from .schema import LlamaShape

LARGE = 2**31  # parameters; a CPU would decompose more than these for hours
COPIES = 2.3  # the model, a copy to inject into, and a workspace


def llama(
    name: str, shape: LlamaShape, device: torch.device, seed: int
) -> tuple[nn.Module, dict[str, PowerLaw]]:
    """Return a Llama of `shape`, made on `device`, and the spectra of its linear weights.

    Raises:
        ConfigurationError: the model does not fit on the device.
    """
    import transformers

    refuse_too_large(name, shape, device)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        dtype = getattr(torch, shape.dtype)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    return model.eval(), fill(model, seed, without=head)


@torch.no_grad()
def fill(model: nn.Module, seed: int, without: nn.Module | None = None) -> dict[str, PowerLaw]:
    """Write a power-law weight into every linear layer, one after the other, on its device."""
    known = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not without:
            known[name] = PowerLaw(*module.weight.shape, name, seed)
            module.weight.copy_(known[name].weight(module.weight.device))
    return known


def refuse_too_large(name: str, shape: LlamaShape, device: torch.device) -> None:
    count = parameters(shape)
    needed = COPIES * count * getattr(torch, shape.dtype).itemsize
    setting = (
        f"models.{name}.llama with {count / 1e9:.1f}e9 parameters in {shape.dtype} is not supported"
    )
    fix = f"or build fewer layers, e.g. models.{name}.llama.layers=1."
    if device.type == "cpu" and count > LARGE:
        raise ConfigurationError(
            f"{setting} on a CPU: must be at most {LARGE / 1e9:.1f}e9. Use device=cuda on a GPU "
            f"with {math.ceil(needed / 2**30)} GiB, {fix}"
        )
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if needed > free:
            raise ConfigurationError(
                f"{setting} on {torch.cuda.get_device_name(device)}: it needs "
                f"{needed / 2**30:.0f} GiB and {free / 2**30:.0f} GiB are free. Use a larger GPU, "
                f"{fix}"
            )


def parameters(shape: LlamaShape) -> int:
    """Return the number of weights in the linear layers and both embeddings."""
    kept = shape.hidden * shape.key_value_heads // shape.heads
    attention = 2 * shape.hidden * (shape.hidden + kept)
    block = attention + 3 * shape.hidden * shape.intermediate
    return shape.layers * block + 2 * shape.vocabulary * shape.hidden
