"""An adapted model's figures of quality, by strategy: the worst of the judged layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from experiments.benchmark import quality
from experiments.benchmark.contenders import LayerFactors, Request, factors
from experiments.benchmark.references import References


def judge(
    contender: str,
    model: Any,
    request: Request,
    references: References,
    objectives: Mapping[str, float],
) -> dict[str, float]:
    """The strategy's figures; one whose reference is missing is left out.

    Args:
        contender: "ours" or "peft": whose model it is.
        objectives: of the exact alternation, by layer, as far as torch.linalg ran it.
    """
    made = factors(contender, model)
    judged = {name: made[name] for name in references.judged if name in made}
    if contender == "peft" and request.method.startswith("corda"):
        return {}  # its R is another: each row of tokens is scaled by its largest entry
    found = {}
    for figure, measure in MEASURES.get(request.method, {}).items():
        values = [measure(name, layer, references, objectives) for name, layer in judged.items()]
        values = [value for value in values if value is not None]
        if values:
            found[figure] = min(values) if figure == "overlap" else max(values)
    return found


def excess(name: str, layer: LayerFactors, references: References, _: Any) -> float | None:
    """Of the PiSSA family: ‖W - s B A‖ over the best that rank r can do."""
    ends = references.of_weight(name)
    if ends is None:
        return None
    approximation = quality.product(layer)
    return quality.excess(references.weight(name), approximation, ends.first[:, : rank(layer)])


def projection_excess(
    name: str, layer: LayerFactors, references: References, _: Any
) -> float | None:
    """Of CorDA: ‖W R - U Uᵀ W R‖ over the best, U the span of B."""
    ends = references.of_product(name, lifted=False)
    if ends is None:
        return None
    product = references.product(name)
    basis = torch.linalg.qr(layer.lora_B.double())[0]
    return quality.excess(product, basis @ (basis.T @ product), ends.first[:, : rank(layer)])


def first_overlap(name: str, layer: LayerFactors, references: References, _: Any) -> float | None:
    """Of B with W's first left singular vectors."""
    ends = references.of_weight(name)
    return None if ends is None else quality.overlap(layer.lora_B, ends.first[:, : rank(layer)])


def last_overlap(name: str, layer: LayerFactors, references: References, _: Any) -> float | None:
    """Of B with W's last."""
    ends = references.of_weight(name)
    if ends is None or ends.last is None:
        return None
    return quality.overlap(layer.lora_B, ends.last[:, -rank(layer) :])


def last_product_overlap(
    name: str, layer: LayerFactors, references: References, _: Any
) -> float | None:
    """Of B with the last ones of W R, the moment lifted as CorDA's documentation says."""
    ends = references.of_product(name, lifted=True)
    return None if ends is None else quality.overlap(layer.lora_B, ends.last[:, -rank(layer) :])


def direction_overlap(
    name: str, layer: LayerFactors, references: References, _: Any
) -> float | None:
    """Of A's rows with the first principal directions of the layer's inputs."""
    exact = references.directions(name)
    return None if exact is None else quality.overlap(layer.lora_A.T, exact[:, -rank(layer) :])


def factor_difference(name: str, layer: LayerFactors, references: References, _: Any) -> float:
    """The larger of both factors' distances to those of a float64 QR of W's first r columns."""
    weight = references.weight(name)
    basis = torch.linalg.qr(weight[:, : rank(layer)])[0]
    return max(
        quality.difference(layer.lora_B, basis), quality.difference(layer.lora_A, basis.T @ weight)
    )


def objective(
    name: str, layer: LayerFactors, references: References, objectives: Mapping[str, float]
) -> float | None:
    """‖W - Q - s B A‖ over the exact alternation's, less 1."""
    best = objectives.get(name) or references.alternated(name, rank(layer))
    if best is None:
        return None
    left = references.weight(name) - layer.base.double() - quality.product(layer)
    return float(left.norm()) / best - 1


def rank(layer: LayerFactors) -> int:
    return layer.lora_A.shape[0]


PISSA = {"excess": excess, "overlap": first_overlap}
MEASURES: dict[str, dict[str, Callable[..., float | None]]] = {
    "olora": {"difference": factor_difference},
    "pissa": PISSA,
    "pissa_niter_1": PISSA,
    "pissa_niter_2": PISSA,
    "pissa_niter_4": PISSA,
    "pissa_niter_16": PISSA,
    "corda_ipm": {"excess of W R": projection_excess},
    "corda_kpm": {"overlap": last_product_overlap},
    "bottom": {"overlap": last_overlap},
    "loftq": {"objective over exact": objective},
    "eva": {"overlap": direction_overlap},
}
"""By method, its figures: (name, factors, references, objectives) -> value, None if not known."""
