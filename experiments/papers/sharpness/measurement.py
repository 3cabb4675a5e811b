"""Curvature at every method's start, batch by batch; the reproduction."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from experiments.console import say
from experiments.errors import nearest
from experiments.papers.findings import Findings
from experiments.papers.paper import PaperSettings
from experiments.papers.sharpness.best_rates import protocol_rates
from experiments.papers.sharpness.charts import figures, tables
from experiments.papers.sharpness.claims import claims, discussion
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
from experiments.papers.subjects import Subject, place
from lora_init import list_initializers
from lora_init.progress import tracked
from lora_init.seeding import layer_generator

BASELINE = "kaiming"
HEADS = ("new", "trained")
METHODS = (
    "kaiming", "gaussian", "orthogonal", "olora", "pissa", "corda", "loftq", "eva", "lora_ga",
    "milora", "init_ab",
)  # fmt: skip


@dataclass
class SharpnessSettings(PaperSettings):
    """Settings.

    Attributes:
        model: as of `subjects.load_subject`; gets a new head for the sentences' two labels.
        methods: initializers, kaiming among them.
        rank, scaling: of every adapter, on all linear layers; scaling = alpha / r.
        batches, batch_size, length: of the measurement under the new head, in sentences and tokens.
        trained_batches: how many of them are measured again under a trained head.
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
    batches: int = 3
    batch_size: int = 16
    length: int = 32
    trained_batches: int = 2
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
        for name in ("rank", "batches", "batch_size", "length", "head_steps",
                     "calibration_batches", "calibration_size", "max_products"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed are integers >= 1")
        if not 0 <= self.trained_batches <= self.batches:
            raise ValueError(
                f"trained_batches={self.trained_batches}; allowed are integers from 0 to batches="
                f"{self.batches}"
            )
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
            subject, count=settings.batches, size=settings.batch_size, length=settings.length,
            seed=settings.seed, device=device,
        )
    )  # fmt: skip
    calibration = list(
        draw_batches(
            subject, count=settings.calibration_batches, size=settings.calibration_size,
            length=settings.length, seed=settings.seed + 1, device=device,
        )
    )  # fmt: skip
    measured = measure(subject, drawn, calibration, "new", settings)
    heads = {"new": head_curvature(subject, drawn, settings)}
    if settings.trained_batches:
        loss = train_head(
            subject,
            draw_batches(
                subject, count=settings.head_steps, size=settings.batch_size,
                length=settings.length, seed=settings.seed + 2, device=device,
            ),
        )  # fmt: skip
        say(f"  head trained alone on the base: loss {loss:.3f}")
        again = drawn[: settings.trained_batches]
        measured += measure(subject, again, calibration, "trained", settings)
        heads["trained"] = head_curvature(subject, again, settings)
    rows = pd.DataFrame(measured)
    return Findings(
        claims=claims(rows, rates),
        setting={
            "model": f"{subject.described}, attention computed the plain way",
            "data": f"sentences of Rotten Tomatoes, {settings.batches} batches of "
            f"{settings.batch_size} × at most {settings.length} tokens; "
            f"{settings.calibration_batches * settings.calibration_size} for calibration",
            "adapter": f"r = {settings.rank}, scaling {settings.scaling:g}, all linear layers, "
            f"{int(rows['size'].iloc[0]):,} parameters; the head is not among them",
            "seeds": f"one of the starts ({settings.seed}); intervals are over batches",
            "eigenvalues": "Lanczos on Hessian products, until the residual is below "
            f"{settings.tolerance:g} of the eigenvalue; {int(rows['products'].min())} to "
            f"{int(rows['products'].max())} products a batch",
            "heads": f"new, as sweeps begin; and trained alone for {settings.head_steps} steps",
            "best rates": origin,
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
) -> dict[str, float]:
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
        "gradient": float(local.gradient.norm()),
        "slope": slope,
        "bend": bend,
    }


def head_curvature(subject: Subject, batches: list[Batch], settings: SharpnessSettings) -> float:
    """The mean of the largest eigenvalue with respect to the head's own parameters."""
    parameters = head_parameters(subject.model)
    for parameter in parameters:
        parameter.requires_grad_(True)
    found = [curvature(subject.model, parameters, batch, settings)["largest"] for batch in batches]
    subject.model.requires_grad_(False)
    return sum(found) / len(found)
