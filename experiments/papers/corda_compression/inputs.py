"""One pass over a corpus: second moments from the library's calibration, magnitudes beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_init import LoraConfig, calibrate

from ..corpus import language_batches
from .projections import Inputs


def observe_inputs(
    model: nn.Module, names: Sequence[str], blocks: Int[Tensor, "blocks length"], batch_size: int
) -> dict[str, Inputs]:
    """The inputs of the layers `names`, by name, over all tokens of `blocks`."""
    config = LoraConfig(
        r=1, target_modules=list(names), task_type="CAUSAL_LM",
        # Of CorDA's modes the one that reads small directions: its sums are in float64.
        init_lora_weights="corda", corda_config={"corda_method": "kpm"},
    )  # fmt: skip
    with magnitudes(model, names) as found:
        calibration = calibrate(model, config, language_batches(blocks, batch_size))
    # Layers that read the same inputs share one object, and then one second moment.
    distinct = {id(layer.inputs): layer.inputs for layer in calibration.layers.values()}
    moments = {key: inputs.second_moment for key, inputs in distinct.items()}
    return {
        name: Inputs(moments[id(layer.inputs)], found[name] / blocks.numel())
        for name, layer in calibration.layers.items()
    }


@contextmanager
def magnitudes(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Float[Tensor, " in"]]]:
    """Sums of |x| over the tokens that pass while the context is open, by layer."""
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        total = inputs.detach().flatten(0, -2).abs().sum(0, dtype=torch.float64)
        sums[name] = sums[name] + total if name in sums else total

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: add(name, args[0])
        )
        for name in names
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
