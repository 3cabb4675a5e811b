"""The effect of training, per layer (end.json) and in total (`end` in result.json)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_init import LoraModel

from ..config.records import MeasuresConfig
from ..tasks import Task
from .angles import mean_angle
from .forgetting import KINDS, forgetting
from .intruders import intruder_dimensions
from .original_model import OriginalModel
from .originals import Originals, spread
from .products import update_norm
from .updates import ratio, update_size


def measure_end(
    original: OriginalModel,
    facts: Originals,
    settings: MeasuresConfig,
    *,
    task_type: str,
    task: Task,
    held_out: Sequence[Any],
    batch_size: int,
) -> dict[str, Any]:
    """The totals, and `layers` with a row for each. Figures that were not measured are None.

    Args:
        original: the trained model, and the base before the adapter.
        facts: the norms and spectra of the original weights.
        held_out: texts to measure forgetting on; `measures.forgetting_texts` of them are used.
    """
    model = original.adapted
    layers = describe_layers(original, facts, settings)
    texts = held_out[: settings.forgetting_texts]
    return {
        "update_size": update_size(model, facts.norms),
        "forgetting": forgetting(original, task_type, task, texts, batch_size),
        "forgetting_kind": KINDS[task_type],
        "intruder_dimensions": mean_of(layers, "intruder_dimensions"),
        "angle_A": mean_of(layers, "angle_A"),
        "angle_B": mean_of(layers, "angle_B"),
        "layers": layers,
    }


def describe_layers(
    original: OriginalModel, facts: Originals, settings: MeasuresConfig
) -> list[dict[str, Any]]:
    """Rows of end.json: update_size = ‖s (B A - B0 A0)‖ / ‖W‖, angles in degrees."""
    model: LoraModel = original.adapted
    counted = set(spread(list(model.layers), settings.intruder_layers))
    rows = []
    for target in model.plan.targets:
        layer = model.layers[target.name]
        lora_A, lora_B = layer.lora_A.detach(), layer.output_factor.detach()
        intruders = None
        if target.name in counted:
            intruders = intruder_dimensions(
                original.weight(target), layer.merged_weight(), settings.intruder_directions
            )
        rows.append(
            {
                "name": target.name,
                "update_size": ratio(update_norm(layer), facts.norms[target.name]),
                "intruder_dimensions": intruders,
                "angle_A": mean_angle(layer.initial_lora_A.T, lora_A.T),
                "angle_B": mean_angle(layer.initial_lora_B, lora_B),
            }
        )
    return rows


def mean_of(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """The mean over the layers that have the figure."""
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else None
