"""Curvature at every method's start, batch by batch; the reproduction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from experiments.console import say
from experiments.errors import nearest
from experiments.papers.reproduction import Findings, Options
from experiments.papers.sharpness.best_rates import protocol_rates
from experiments.papers.sharpness.charts import figures, tables
from experiments.papers.sharpness.claims import BASELINE, claims, discussion
from experiments.papers.sharpness.curvature import Curvature
from experiments.papers.sharpness.lanczos import extreme_eigenvalues
from experiments.papers.sharpness.starts import (
    Batch,
    adapter_parameters,
    draw_batches,
    head_parameters,
    load_classifier,
    started,
    train_head,
)
from experiments.papers.subject import Subject, place
from lora_init import list_initializers
from lora_init.progress import tracked
from lora_init.seeding import layer_generator

HEADS = ("new", "trained")
METHODS = (
    "kaiming", "gaussian", "orthogonal", "olora", "pissa", "corda", "loftq", "eva", "lora_ga",
    "milora", "init_ab",
)  # fmt: skip


@dataclass
class SharpnessSettings(Options):
    """Settings.

    Attributes:
        model: as of `subjects.load_subject`; gets a new head for the sentences' two labels.
        methods: initializers, kaiming among them.
        rank, scaling: of every adapter, on all linear layers; scaling = alpha / r.
        batches: measured under a new head, whose curvatures are held against the best rates.
        trained_batches: measured under a trained head, where the paper's ratios are judged: their
            intervals are over these. The first ones are the same as under the new head.
        batch_size, length: of each, in sentences and tokens.
        head_steps: of the training of the head alone, on the base, by other sentences.
        calibration_batches, calibration_size: for the methods that calibrate.
        tolerance, max_products: of Lanczos: the residual over the largest eigenvalue, and the
            Hessian products that it may take on a batch.
        best_rates: by method, the learning rate that a sweep found best.
        best_rates_from: which sweep that was, in words.
        protocol: a sweep's folder, whose record is read instead.
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
        for name in self.methods:
            if name not in known:
                raise ValueError(f"methods: {name!r} is unknown; {nearest(name, known)}allowed are "
                                 f"{', '.join(known)}")  # fmt: skip
        if BASELINE not in self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods={self.methods}; allowed are different names with {BASELINE}")
        for name in ("rank", "batches", "trained_batches", "batch_size", "length", "head_steps",
                     "calibration_batches", "calibration_size", "max_products"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed are integers >= 1")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance}; allowed are numbers between 0 and 1")
        if not 0 < self.scaling < math.inf:
            raise ValueError(f"scaling={self.scaling}; allowed are finite numbers > 0")
        for name, rate in self.best_rates.items():
            if not 0 < rate < math.inf:
                raise ValueError(f"best_rates.{name}={rate}; allowed are finite rates > 0")


def reproduce(settings: SharpnessSettings) -> Findings:
    """Measure, correlate, and judge."""
    rates, origin = known_rates(settings)
    device = place(settings.device)
    subject = load_classifier(settings.model, settings.seed, device)
    drawn = list(
        draw_batches(
            subject, count=max(settings.batches, settings.trained_batches),
            size=settings.batch_size, length=settings.length, seed=settings.seed, device=device,
        )
    )  # fmt: skip
    calibration = list(
        draw_batches(
            subject, count=settings.calibration_batches, size=settings.calibration_size,
            length=settings.length, seed=settings.seed + 1, device=device,
        )
    )  # fmt: skip
    batches = {"new": drawn[: settings.batches], "trained": drawn[: settings.trained_batches]}
    measured, head_rows = [], []
    for head in HEADS:
        if head == "trained":
            loss = train_head(
                subject,
                draw_batches(
                    subject, count=settings.head_steps, size=settings.batch_size,
                    length=settings.length, seed=settings.seed + 2, device=device,
                ),
            )  # fmt: skip
            say(f"  head trained alone on the base: loss {loss:.3f}")
        measured += measure(subject, batches[head], calibration, head, settings)
        head_rows += head_curvature(subject, batches[head], head, settings)
    rows = pd.DataFrame(measured)
    of_heads = pd.DataFrame(head_rows)
    heads = of_heads.groupby("head", sort=False)["largest"].mean().to_dict()
    return Findings(
        claims=claims(rows, rates),
        setting={
            "model": f"{subject.described}, attention computed the plain way",
            "data": f"sentences of Rotten Tomatoes, batches of {settings.batch_size} × at most "
            f"{settings.length} tokens: {settings.batches} under the new head, "
            f"{settings.trained_batches} under the trained one; "
            f"{settings.calibration_batches * settings.calibration_size} for calibration",
            "adapter": f"r = {settings.rank}, scaling {settings.scaling:g}, all linear layers, "
            f"{int(rows['size'].iloc[0]):,} parameters; the head is not among them",
            "seeds": f"one of the starts ({settings.seed}); intervals are over batches",
            "eigenvalues": precision(pd.concat([rows, of_heads]), settings),
            "heads": "new, as sweeps begin, for the correlation with best rates; and trained alone "
            f"for {settings.head_steps} steps, for the ratios",
            "best rates": origin + without_rates(settings.methods, rates),
            "the paper’s": "Qwen3-0.6B, decoders of language; rates tuned at r = 128",
        },
        tables=tables(rows, rates),
        figures=figures(rows, rates),
        discussion=discussion(rows, rates, heads),
    )


def known_rates(settings: SharpnessSettings) -> tuple[dict[str, float], str]:
    """The best rates of measured methods, and where they come from."""
    if settings.protocol is None:
        rates, origin = settings.best_rates, settings.best_rates_from
    else:
        rates = protocol_rates(settings.protocol, settings.rank)
        origin = f"protocol.json of {settings.protocol}"
    rates = {name: rate for name, rate in rates.items() if name in settings.methods}
    return rates, origin or "given in the settings"


def without_rates(methods: list[str], rates: dict[str, float]) -> str:
    """Which measured methods no sweep has tuned."""
    unknown = [name for name in methods if name not in rates]
    return f"; none of {', '.join(unknown)}" if rates and unknown else ""


def precision(rows: pd.DataFrame, settings: SharpnessSettings) -> str:
    """How Lanczos ended: the limit on its products may stop it before the tolerance."""
    open_ones = rows[~rows["converged"].astype(bool)]
    told = (
        "Lanczos on Hessian products, until the residual is below "
        f"{settings.tolerance:g} of the eigenvalue: so in {len(rows) - len(open_ones)} of "
        f"{len(rows)} cases, after {int(rows['products'].min())} to "
        f"{int(rows['products'].max())} products"
    )
    if len(open_ones):
        told += (
            f"; {len(open_ones)} stopped at {settings.max_products} products, residual "
            f"up to {open_ones['residual'].max():.2g} of the eigenvalue"
        )
    return told


def measure(
    subject: Subject,
    batches: list[Batch],
    calibration: list[Batch],
    head: str,
    settings: SharpnessSettings,
) -> list[dict[str, Any]]:
    """A row a method and batch, under the head that the model has now."""
    rows = []
    say(f"  {len(settings.methods)} starts, {len(batches)} batches each, {head} head")
    for method in tracked(settings.methods, f"curvature, {head} head"):
        with started(
            subject, method, rank=settings.rank, scaling=settings.scaling,
            calibration=calibration, seed=settings.seed,
        ) as model:  # fmt: skip
            parameters = adapter_parameters(model)
            for number, batch in enumerate(batches):
                found = {"method": method, "head": head, "batch": number}
                rows.append(found | curvature(model, parameters, batch, settings))
    return rows


def curvature(
    model: torch.nn.Module,
    parameters: list[torch.nn.Parameter],
    batch: Batch,
    settings: SharpnessSettings,
) -> dict[str, Any]:
    """The ends of the Hessian's spectrum, the gradient and Adam's first step, on one batch."""
    local = Curvature(model(**batch).loss, parameters)
    size = len(local.gradient)
    start = torch.randn(size, generator=layer_generator(settings.seed, "Lanczos"))
    found = extreme_eigenvalues(
        local.times, start.to(local.gradient), tolerance=settings.tolerance,
        limit=settings.max_products,
    )  # fmt: skip
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


def head_curvature(
    subject: Subject, batches: list[Batch], head: str, settings: SharpnessSettings
) -> list[dict[str, Any]]:
    """A row a batch: the same with respect to the head's own parameters."""
    parameters = head_parameters(subject.model)
    for parameter in parameters:
        parameter.requires_grad_(True)
    rows = [
        {"head": head} | curvature(subject.model, parameters, batch, settings) for batch in batches
    ]
    subject.model.requires_grad_(False)
    return rows
