"""Models without a checkpoint: Llama's shapes, and a single layer, with power-law weights."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from experiments.benchmark.powerlaw import PowerLaw
from experiments.benchmark.settings import LayerShape, LlamaShape
from experiments.errors import ConfigurationError

LARGE = 2**31  # parameters that no CPU decomposes in an evening
COPIES = 2.3  # the model, a fresh copy to inject into, and a workspace


class SingleLayer(nn.Module):
    """One linear layer, called like a model: `model(x=rows).logits`."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.layer = nn.Linear(shape.columns, shape.rows, bias=False)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(x))


def single_layer(
    shape: LayerShape, device: torch.device, seed: int
) -> tuple[nn.Module, dict[str, PowerLaw]]:
    """The layer in float32 on `device`, and what its weight is."""
    with torch.device(device):
        model = SingleLayer(shape)
    return model, filled(model, seed)


def llama(
    name: str, shape: LlamaShape, device: torch.device, seed: int
) -> tuple[nn.Module, dict[str, PowerLaw]]:
    """A Llama of `shape`, made on `device` and nowhere else, and what its linear weights are.

    Embeddings, head and norms are drawn as transformers does.

    Raises:
        ConfigurationError: it does not fit where it should be.
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
    return model.eval(), filled(model, seed, without=head)


@torch.no_grad()
def filled(model: nn.Module, seed: int, without: nn.Module | None = None) -> dict[str, PowerLaw]:
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
    told = f"models.{name}.llama has {count / 1e9:.1f}e9 parameters in {shape.dtype}"
    fix = f"or build fewer layers, e.g. models.{name}.llama.layers=1"
    if device.type == "cpu" and count > LARGE:
        raise ConfigurationError(
            f"{told}; allowed on a CPU are {LARGE / 1e9:.1f}e9: use device=cuda on a GPU with "
            f"{math.ceil(needed / 2**30)} GiB, {fix}"
        )
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if needed > free:
            raise ConfigurationError(
                f"{told} and needs {needed / 2**30:.0f} GiB; {torch.cuda.get_device_name(device)} "
                f"has {free / 2**30:.0f} GiB free: use a larger GPU, {fix}"
            )


def parameters(shape: LlamaShape) -> int:
    """Of the linear layers and both embeddings."""
    kept = shape.hidden * shape.key_value_heads // shape.heads
    attention = 2 * shape.hidden * (shape.hidden + kept)
    block = attention + 3 * shape.hidden * shape.intermediate
    return shape.layers * block + 2 * shape.vocabulary * shape.hidden
