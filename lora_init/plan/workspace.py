"""How much memory a method takes while it runs, as multiples of the weight and the moments."""

from __future__ import annotations

from typing import Any

from lora_init.registry import Initializer

COPIES: dict[str, tuple[float, float]] = {
    "astra": (3.5, 3.0),
    "corda": (1.0, 3.0),
    "eva": (1.0, 5.0),
    "eva_frozen": (1.0, 5.0),
    "from_delta": (6.5, 0.0),
    "from_delta_subtracted": (6.5, 0.0),
    "geora": (6.0, 0.0),
    "loftq": (6.5, 0.0),
    "lora_da": (5.0, 14.0),
    "lora_da_frozen": (5.0, 14.0),
    "lora_ga": (4.0, 0.0),
    "lora_null": (2.0, 6.5),
    "lora_null_frozen": (2.0, 6.5),
    "mica": (9.0, 0.0),
    "milora": (9.0, 0.0),
    "osrm": (0.5, 4.5),
    "osrm_frozen": (0.5, 4.5),
    "qera": (5.0, 3.0),
    "qpissa": (8.0, 0.0),
    "rlmo": (9.0, 0.0),
    "sc_lora": (8.0, 6.0),
    "srr": (8.5, 2.5),
}
"""Float32 copies of a weight and of its inputs' second moment at the peak of each method, measured
at ranks far below the layer's sizes."""
CORDA_OF_LEAST_TRIPLETS = (7.0, 4.0)
OTHERS = (3.0, 0.0)


def copies(spec: Initializer, options: Any) -> tuple[float, float]:
    """How many float32 copies of a weight and of its moments a method has in memory at its peak."""
    if spec.name == "corda" and options.corda_method == "kpm":
        return CORDA_OF_LEAST_TRIPLETS
    return COPIES.get(spec.name, OTHERS)
