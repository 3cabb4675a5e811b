"""Facts about a run before its first step: `start` in result.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lora_init import LoraModel

from .products import product_norm
from .updates import ratio


def describe_start(
    model: LoraModel,
    norms: Mapping[str, float],
    init: Mapping[str, Any],
    gradient_norms: Mapping[str, float],
) -> dict[str, Any]:
    """Sizes over all adapted layers together (square roots of sums of squares), gaps and costs.

    Args:
        model: only its initial factors are read, so it may have been trained.
        norms: the norms of the original weights, by layer.
        init: the content of init.json.
        gradient_norms: of the first step: in total, of A, of B and of the head.
    """
    layers = model.layers
    starts = [(layer.initial_lora_A, layer.initial_lora_B) for layer in layers.values()]
    products = [
        layer.scaling * product_norm(layer.initial_lora_B, layer.initial_lora_A)
        for layer in layers.values()
    ]
    return {
        "output_gap": init["output_gap"],
        "first_step_error": init.get("first_step_error"),  # older runs have none
        "norm_A": math.hypot(*(float(lora_A.double().norm()) for lora_A, _ in starts)),
        "norm_B": math.hypot(*(float(lora_B.double().norm()) for _, lora_B in starts)),
        "relative_norm": ratio(math.hypot(*products), math.hypot(*(norms[n] for n in layers))),
        "gradient_norms": dict(gradient_norms),
        "init_seconds": init["seconds"]["total"],
        "calibration_seconds": init["seconds"]["calibration"],
        "peak_memory_bytes": init["peak_memory_bytes"],
        "added_memory_bytes": added_memory(init),
        "calibration_tokens": init["calibration_tokens"],
    }


def added_memory(init: Mapping[str, Any]) -> int | None:
    """What the start used beyond what was held before it; None where that is not known."""
    held = init.get("held_memory_bytes")
    return None if held is None else max(init["peak_memory_bytes"] - held, 0)
