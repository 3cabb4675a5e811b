"""The rows of sharpness at the start: the ends of the Hessian's spectrum by method and batch.

Every method starts on one classifier, under a new head and under a head that was trained alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init import LoraConfig, list_initializers
from lora_init.layer import layer_generator
from lora_init.progress import tracked

from ..console import say
from ..errors import ConfigurationError
from .classifier import (
    Batch,
    draw_batches,
    load_classifier,
    train_head,
)
from .reproduction import Measurement, Options, require, require_at_least
from .starts import adapted
from .subject import Subject, place

BASELINE = "kaiming"
NEW, TRAINED = "new", "trained"
METHODS = (
    "kaiming",
    "gaussian",
    "orthogonal",
    "olora",
    "pissa",
    "corda",
    "loftq",
    "eva",
    "lora_ga",
    "milora",
    "init_ab",
)


@dataclass
class SharpnessOptions(Options):
    """What is measured.

    Attributes:
        model: as `load_subject` takes it; gets a new head for the sentences' two labels.
        methods: initializers, kaiming among them.
        rank, scaling: of every adapter, on all linear layers; scaling = alpha / r.
        batches: measured under a new head, whose curvatures are compared with the best rates.
        trained_batches: measured under a trained head, which decides the paper's ratios. The first
            ones are the same as under the new head.
        batch_size, length: of each batch, in sentences and tokens.
        head_steps: of the training of the head alone, on other sentences.
        calibration_batches, calibration_size: for the methods that calibrate.
        tolerance, max_products: of Lanczos: the residual over the largest eigenvalue, and the
            largest number of Hessian products per batch.
        best_rates: by method, the best learning rate in a sweep.
        best_rates_from: the sweep in words.
        protocol: the folder of a sweep whose best rates are read instead.
    """

    model: str = "minilm"
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    rank: int = 8
    scaling: float = 2.0
    batches: int = 2
    trained_batches: int = 5
    batch_size: int = 10
    length: int = 32
    head_steps: int = 60
    calibration_batches: int = 8
    calibration_size: int = 32
    tolerance: float = 0.05
    max_products: int = 60
    best_rates: dict[str, float] = field(default_factory=dict)
    best_rates_from: str = ""
    protocol: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [spec.name for spec in list_initializers()]
        registered = set(self.methods) <= set(known)
        require(self, "methods", registered, f"names from {', '.join(known)}")
        distinct = len(set(self.methods)) == len(self.methods) and BASELINE in self.methods
        require(self, "methods", distinct, f"different names with {BASELINE}")
        require_at_least(self, 1, "rank", "batches", "trained_batches", "batch_size", "length")
        require_at_least(self, 1, "head_steps", "calibration_batches", "calibration_size")
        require_at_least(self, 1, "max_products")
        require(self, "tolerance", 0 < self.tolerance < 1, "between 0 and 1")
        require(self, "scaling", 0 < self.scaling < math.inf, "a finite number > 0")
        finite = all(0 < rate < math.inf for rate in self.best_rates.values())
        require(self, "best_rates", finite, "finite rates > 0")


def protocol_rates(folder: str, rank: int) -> dict[str, float]:
    """By method, the best rate at `rank` in a sweep of the fair protocol, without controls.

    Raises:
        ConfigurationError: the record is missing or unreadable, or has no such rank.
    """
    path = Path(folder).expanduser() / "protocol.json"
    try:
        selected = json.loads(path.read_text())["selected"].values()
        found = {
            entry["method"]: float(entry["learning_rate"])
            for entry in selected
            if entry["rank"] == rank and entry["arm"] == entry["method"]
        }
        ranks = sorted({entry["rank"] for entry in selected})
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"protocol={folder!r} is not supported: must be the folder of a sweep, with its "
            "protocol.json. Run --config-name sweep_protocol."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"protocol={folder!r}: cannot read {path}: {error}") from error
    if not found:
        raise ConfigurationError(
            f"protocol={folder!r} has no rates at rank={rank}: must be one of "
            f"{', '.join(map(str, ranks)) or 'none'}"
        )
    return found


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained factors, without the head."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and {"lora_A", "lora_B"} & set(name.split("."))
    ]


# -- curvature -------------------------------------------------------------------------------------


class Curvature:
    """The gradient of a loss, and products with its Hessian.

    The graph of the gradient is built once and kept. A product then costs one backward pass through
    it (H v = ∂ ⟨∂L, v⟩), about three forward passes. Attention must be differentiable twice
    (transformers' "eager").

    Attributes:
        gradient: of all parameters in one vector.
    """

    def __init__(self, loss: Float[Tensor, ""], parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._gradients = torch.autograd.grad(
            loss, self.parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        self.gradient = flat(self._gradients).detach()

    def times(self, vector: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
        """H v."""
        parts = vector.split([p.numel() for p in self.parameters])
        shaped = [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]
        products = torch.autograd.grad(
            self._gradients,
            self.parameters,
            shaped,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return flat(products).detach()

    def along_signs(self) -> tuple[float, float]:
        """‖g‖₁ = gᵀ d and dᵀ H d for d = sign g, the direction of Adam's first step.

        At the rate η a quadratic model's loss falls by η ‖g‖₁ - η² dᵀ H d / 2.
        """
        direction = self.gradient.sign()
        return float(self.gradient.abs().sum()), float(direction @ self.times(direction))


def flat(tensors: Sequence[Tensor]) -> Float[Tensor, " size"]:
    """All entries of some tensors in one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@dataclass(frozen=True)
class Extremes:
    """The ends of a spectrum.

    Attributes:
        largest, smallest: eigenvalues, with sign. The smallest is a bound from above; only the
            largest decides when to stop.
        error: a bound on the distance of `largest` from an eigenvalue: the residual's norm.
        products: the number of products with the operator.
        converged: whether the bound is within the tolerance.
    """

    largest: float
    smallest: float
    error: float
    products: int
    converged: bool


def extreme_eigenvalues(
    times: Callable[[Float[Tensor, " size"]], Float[Tensor, " size"]],
    start: Float[Tensor, " size"],
    *,
    tolerance: float,
    limit: int,
) -> Extremes:
    """Lanczos with full reorthogonalization, until the largest Ritz value has converged.

    A Ritz pair (θ, V s) of the basis V has the residual β |s_k|, with β the norm of the next
    direction and s_k the last entry of s: an eigenvalue lies within that distance of θ. It is
    usually closer, by the square of that distance over the gap.

    Args:
        times: v -> H v, H symmetric.
        start: the first direction, drawn at random: one that is orthogonal to the eigenvector never
            finds it.
        tolerance: stop if the residual is below this share of the largest Ritz value.
        limit: the largest number of products.

    Raises:
        ValueError: `start` is zero, or a product is not finite.
    """
    norm = start.norm()
    if not norm > 0:
        raise ValueError("start=0 is not supported: must be another vector.")
    basis = [start / norm]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    while True:
        product = times(basis[-1])
        if not product.isfinite().all():
            raise ValueError("the operator's product is not finite")
        diagonal.append(float(product @ basis[-1]))
        space = torch.stack(basis)
        for _ in range(2):  # a second pass removes the rounding errors of the first
            product = product - space.mT @ (space @ product)
        rest = float(product.norm())
        values, vectors = np.linalg.eigh(
            np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)
        )
        error = rest * abs(float(vectors[-1, -1]))
        largest = float(values[-1])
        # A Krylov space that is exhausted (rest = 0) has found what `start` can reach.
        converged = error <= tolerance * abs(largest)
        if converged or len(basis) >= min(limit, len(start)):
            return Extremes(largest, float(values[0]), error, len(diagonal), converged)
        basis.append(product / rest)
        off_diagonal.append(rest)


def measure(options: SharpnessOptions) -> Measurement:
    """Measure every start under the new head, then under the trained one."""
    rates, origin = known_rates(options)
    device = place(options.device)
    subject = load_classifier(options.model, options.seed, device)

    def batches(count: int, size: int, offset: int) -> list[Batch]:
        seed = options.seed + offset
        shape = {"count": count, "size": size, "length": options.length}
        return list(draw_batches(subject, **shape, seed=seed, device=device))

    drawn = batches(max(options.batches, options.trained_batches), options.batch_size, 0)
    calibration = batches(options.calibration_batches, options.calibration_size, 1)
    rows = []
    for head, count in ((NEW, options.batches), (TRAINED, options.trained_batches)):
        if head == TRAINED:
            loss = train_head(subject, batches(options.head_steps, options.batch_size, 2))
            say(f"  head trained alone on the base: loss {loss:.3f}")
        rows += measure_starts(subject, drawn[:count], calibration, head, options)
    frames = {
        "starts": pd.DataFrame(rows),
        "rates": pd.DataFrame(rates.items(), columns=["method", "rate"]),
    }
    facts = {
        "model": f"{subject.described}, attention computed the plain way",
        "data": "sentences of Rotten Tomatoes",
        "adapter": f"all linear layers, {rows[0]['size']:,} parameters without the head",
        "eigenvalues": precision(frames["starts"], options),
        "heads": "new, as sweeps begin, for the correlation with best rates; and trained alone, "
        "for the ratios; intervals are over batches",
        "best rates": origin,
        "the paper’s": "Qwen3-0.6B, decoders of language; rates tuned at r = 128",
    }
    return Measurement(options, frames, facts)


def known_rates(options: SharpnessOptions) -> tuple[dict[str, float], str]:
    """The best rates of measured methods, and their origin in words."""
    if options.protocol is None:
        rates, origin = options.best_rates, options.best_rates_from
    else:
        rates = protocol_rates(options.protocol, options.rank)
        origin = f"protocol.json of {options.protocol}"
    rates = {name: rate for name, rate in rates.items() if name in options.methods}
    return rates, origin or "given in the settings"


def precision(rows: pd.DataFrame, options: SharpnessOptions) -> str:
    """How Lanczos ended: its largest number of products may stop it before the tolerance."""
    converged = int(rows["converged"].sum())
    return (
        f"Lanczos on Hessian products, at most {options.max_products} each, until the residual is "
        f"below {options.tolerance:g} of the eigenvalue: so in {converged} of {len(rows)} cases; "
        f"the largest residual is {rows['residual'].max():.2g} of it"
    )


def measure_starts(
    subject: Subject,
    batches: list[Batch],
    calibration: list[Batch],
    head: str,
    options: SharpnessOptions,
) -> list[dict[str, Any]]:
    """A row per method and batch, under the head that the model has now."""
    rows = []
    say(f"  {len(options.methods)} starts, {len(batches)} batches each, {head} head")
    for method in tracked(options.methods, f"curvature, {head} head"):
        config = LoraConfig(
            r=options.rank,
            lora_alpha=options.scaling * options.rank,
            target_modules="all-linear",
            task_type="SEQ_CLS",
            init_lora_weights=method,
        )
        with adapted(
            subject.model,
            config,
            f"methods={method}",
            calibration,
            seed=options.seed,
            keep_original=True,
        ) as model:
            parameters = adapter_parameters(model)
            for number, batch in enumerate(batches):
                found = {"method": method, "head": head, "batch": number}
                rows.append(found | curvature(model, parameters, batch, options))
    return rows


def curvature(
    model: torch.nn.Module,
    parameters: list[torch.nn.Parameter],
    batch: Batch,
    options: SharpnessOptions,
) -> dict[str, Any]:
    """The ends of the Hessian's spectrum, the gradient and Adam's first step, on one batch."""
    local = Curvature(model(**batch).loss, parameters)
    size = len(local.gradient)
    start = torch.randn(size, generator=layer_generator(options.seed, "Lanczos"))
    found = extreme_eigenvalues(
        local.times,
        start.to(local.gradient),
        tolerance=options.tolerance,
        limit=options.max_products,
    )
    slope, bend = local.along_signs()
    return {
        "size": size,
        "largest": found.largest,
        "smallest": found.smallest,
        "products": found.products,
        "residual": found.error / abs(found.largest) if found.largest else math.inf,
        "converged": found.converged,
        "gradient": float(local.gradient.norm()),
        "slope": slope,
        "bend": bend,
    }
