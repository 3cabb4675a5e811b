"""The report of an initialization: figures per layer and in total."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lora_init import linalg
from lora_init.factors import low_rank_product, matrix_blocks, mean_figures
from lora_init.layers import LoraLayer
from lora_init.linalg.matrix import widened
from lora_init.linalg.precision import full_precision, wide
from lora_init.plan.left_out import LeftOut, described
from lora_init.plan.plan import Target
from lora_init.plan.tables import render
from lora_init.weights.kinds import known_format
from lora_init.weights.sharded import whole


@dataclass
class LayerReport:
    """One row of the report; a figure that the method does not have is None.

    The figures of a fused parameter are means over its experts.

    Attributes:
        relative_norm: ‖s B0 A0‖ / ‖W‖ (Frobenius).
        norm_A, norm_B: Frobenius norms of the initial factors.
        captured_energy: ‖W P‖² / ‖W‖², where P projects on the row space of A0: the share of the
            weight in the adapter's initial directions. If A0 = 0, it is ‖P W‖² / ‖W‖² with the
            projection on the column space of B0.
        error: ‖W - s B0 A0‖ / ‖W‖ for a subtracted base, the share of the weight that is frozen;
            ‖W - Q - s B0 A0‖ / ‖W‖ for a replaced base.
        seconds: time of the layer's initializer.
        base: kept, edited, in_forward or replaced.
        details: the other metrics of the method.
    """

    name: str
    module_type: str
    out_features: int
    in_features: int
    rank: int
    alpha: float
    scaling: float
    relative_norm: float | None = None
    norm_A: float | None = None
    norm_B: float | None = None
    captured_energy: float | None = None
    error: float | None = None
    seconds: float | None = None
    base: str = "kept"
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, target: Target, seconds: float | None) -> LayerReport:
        """The row of a target, without figures yet."""
        return cls(
            name=target.name,
            module_type=target.module_type,
            out_features=target.shape[0],
            in_features=target.shape[1],
            rank=target.rank,
            alpha=target.alpha,
            scaling=target.scaling,
            seconds=seconds,
        )


@dataclass
class InitReport:
    """The result of `LoraModel.init_report()`: print it as a table, or call `to_dict()`.

    `left_out` lists modules and parameters that look like linear maps but have no adapter.
    """

    method: str
    options: dict[str, Any]
    base: str
    needs_calibration: bool
    seconds: dict[str, float]
    calibration_tokens: int
    layers: list[LayerReport]
    left_out: list[LeftOut] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        header = ["layer", "shape", "rank", "‖sBA‖/‖W‖", "captured energy", "error", "ms", "base"]
        bare = [layer.details.get("error_without_adapter") for layer in self.layers]
        rows = [
            [
                layer.name,
                f"{layer.out_features}×{layer.in_features}",
                layer.rank,
                layer.relative_norm,
                layer.captured_energy,
                layer.error,
                None if layer.seconds is None else f"{1e3 * layer.seconds:.1f}",
                layer.base,
            ]
            for layer in self.layers
        ]
        if any(error is not None for error in bare):  # error of the quantized base alone
            header.insert(6, "without sBA")
            for row, error in zip(rows, bare, strict=True):
                row.insert(6, error)
        spent = ", ".join(f"{name} {value:.2f} s" for name, value in self.seconds.items())
        tokens = (
            f"; {self.calibration_tokens:,} calibration tokens" if self.needs_calibration else ""
        )
        left_out = "".join(f"\nleft out: {line}" for line in described(self.left_out))
        return f"{self.method} {self.options}: {spent}{tokens}\n{render(header, rows)}{left_out}"


@full_precision()
def weight_figures(
    weight: Float[Tensor, "out in"] | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    groups: int = 1,
) -> dict[str, float | None]:
    """relative_norm, norm_A, norm_B and captured_energy of initial factors on a weight.

    Without a weight, as of a quantizer whose values cannot be read, only the norms of the factors.

    Args:
        groups: of a convolution. Each group has its own rows of the weight, of A and of B.
    """
    lora_A, lora_B = lora_A.detach().float(), lora_B.detach().float()
    norm_A = float(linalg.frobenius_norm(lora_A))
    norm_B = float(linalg.frobenius_norm(lora_B))
    figures: dict[str, float | None] = {"norm_A": norm_A, "norm_B": norm_B}
    if weight is None or (norm := float(linalg.frobenius_norm(weight))) == 0.0:
        return figures | {"relative_norm": None, "captured_energy": None}
    weight = weight.float()
    # ‖B A‖² = <BᵀB, A Aᵀ>, r × r; float64, because for `orthogonal` the terms cancel.
    wide_A, wide_B = wide(lora_A), wide(lora_B)
    gram = (wide_B.T @ wide_B) * (wide_A @ wide_A.T)
    figures["relative_norm"] = scaling * float(gram.sum().clamp_min(0).sqrt()) / norm
    if norm_A == norm_B == 0:
        return figures | {"captured_energy": None}
    captured = 0.0
    parts = (one.chunk(groups) for one in (weight, lora_A, matrix_blocks(lora_B, groups)))
    for rows, own_A, own_B in zip(*parts, strict=True):
        image = rows @ _orthonormal(own_A.T) if norm_A > 0 else _orthonormal(own_B).T @ rows
        captured += float(linalg.frobenius_norm(image)) ** 2
    figures["captured_energy"] = captured / norm**2
    return figures


def _orthonormal(columns: Tensor) -> Tensor:
    """A basis of the columns' span, without directions whose singular value is negligible."""
    left, values, _ = linalg.thin_svd(wide(columns))
    return left[:, values > 1e-7 * values[0]].float().to(columns.device)


def describe_layer(
    layer: LoraLayer,
    report: LayerReport,
    metrics: Mapping[str, Any],
    original_weight: Callable[[], Tensor],
) -> None:
    """Fill in the figures of a layer's report.

    Args:
        layer: the adapted layer.
        report: the row to fill in.
        metrics: the method's metrics. For a replaced base they include all figures, because its
            original weight is gone.
        original_weight: function that loads the layer's original weight.
    """
    report.base = layer.base_state
    for name, value in metrics.items():
        if name in ("error", "relative_norm", "norm_A", "norm_B", "captured_energy"):
            setattr(report, name, value)
        else:
            report.details[name] = value
    if layer.base_state == "replaced" or layer.initial_lora_A is None:
        return
    is_readable = known_format(layer.base_layer).opaque(layer.base_layer) is None
    weights = original_weight() if is_readable else None
    factors = whole(layer.initial_lora_A), whole(layer.initial_lora_B)
    if factors[0].ndim > 2 and weights is not None:
        matrices = list(zip(weights, *factors, strict=True))
    else:
        matrices = [(weights, *factors)]
    figures = []
    for weight, lora_A, lora_B in matrices:
        groups = getattr(layer.base_layer, "groups", 1)
        figures.append(weight_figures(weight, lora_A, lora_B, layer.scaling, groups))
        if weight is None:
            continue
        norm = linalg.frobenius_norm(widened(weight))
        if layer.base_state in ("edited", "in_forward") and norm > 0:
            product = low_rank_product(lora_A, lora_B, layer.scaling)
            figures[-1]["error"] = float(linalg.frobenius_norm(weight - product) / norm)
    for name, value in mean_figures(figures).items():
        setattr(report, name, value)
