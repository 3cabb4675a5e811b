"""The way from two models to the claims about QPiSSA."""

from __future__ import annotations

import pandas as pd

from ...console import say
from ..claim import Claim
from ..reproduction import (
    Figure,
    Measurement,
    Reproduction,
    Table,
)
from ..subject import load_subject
from . import claims, figures, tables
from .options import PissaQuantizationOptions
from .rows import chosen_layers, rows_of_model, width_of
from .white_noise import leading_share


def measure(options: PissaQuantizationOptions) -> Measurement:
    """Measure the error of each layer by method, rank and T; one frame has the models."""
    rows, models, described = [], [], []
    for name in options.models:
        subject = load_subject(name)
        layers = chosen_layers(subject, options.blocks)
        blocks = sorted({layer.block for layer in layers})
        say(f"  {name}: {len(layers)} layers of {len(blocks)} blocks")
        width = width_of(subject)
        judged = options.judged_rank(width)
        models.append({"model": subject.short, "width": width, "judged": judged})
        numbers = ", ".join(map(str, blocks))
        described.append(f"{subject.described}; {len(layers)} layers: blocks {numbers}")
        rows += [{**row, "model": subject.short} for row in rows_of_model(subject, options)]
    share = f"{100 * options.share:.3g} %"
    ranks = ", ".join(f"{model['judged']} on {model['model']}" for model in models)
    facts = {
        "models": ". ".join(described),
        "judged at": f"r = {ranks}: {share} of the width, the paper’s 128 of 4096; other ranks "
        f"and controls on {options.detailed} of the blocks",
        "quantizer": "NF4 in blocks of 64, of the library (bitsandbytes’ values to the bit)",
        "inputs": f"for the output error only: about {options.tokens} tokens of film plots, "
        "of film reviews for MiniLM",
        "the paper’s": "Llama-2-7B, r = 128, and Llama-3-8B, r = 64; nuclear norm, all layers",
    }
    frames = {"errors": pd.DataFrame(rows), "models": pd.DataFrame(models)}
    return Measurement(options, frames, facts)


def by_model(measured: Measurement, column: str) -> dict[str, int]:
    """The judged rank or the width of each model."""
    models = measured["models"]
    return {name: int(value) for name, value in zip(models["model"], models[column], strict=True)}


def judge_all(measured: Measurement) -> list[Claim]:
    """The claims in the paper's order."""
    return claims.all_claims(measured["errors"], by_model(measured, "judged"))


def tabulate(measured: Measurement) -> list[Table]:
    """The paper's tables with ours, and all rows."""
    judged, widths = by_model(measured, "judged"), by_model(measured, "width")
    return tables.tables(measured["errors"], judged, widths)


def draw(measured: Measurement) -> list[Figure]:
    """Reductions by layer, rank and method."""
    judged, widths = by_model(measured, "judged"), by_model(measured, "width")
    names = {model: f"{model} (width {width})" for model, width in widths.items()}
    return figures.figures(measured["errors"], judged, widths, names)


def discuss(measured: Measurement) -> list[str]:
    """Compare the figures with white noise, and say what the controls show."""
    rows = measured["errors"]
    chosen = claims.at_judged_rank(rows, by_model(measured, "judged"))
    first = chosen[chosen["T"] == chosen["T"].min()]
    layers = first.pivot_table(
        index=["model", "part", "block"], columns="method", values=["nuclear", "noise", "smaller"]
    )
    loftq, noise = layers["nuclear", "loftq"], layers["noise", "loftq"]
    lead = layers["nuclear", "pissa"] - loftq
    expected = layers["smaller", "pissa"] - noise
    agreement = float(((lead > 0) == (expected > 0)).mean())
    leading = float((lead > 0).mean())
    shares = [
        f"{model}: {loftq[model].mean():.1f} % and {noise[model].mean():.1f} %"
        for model in dict.fromkeys(rows["model"])
    ]
    square, wide = (100 * leading_share(side, 4096, 128) for side in (4096, 11008))
    sentences = [
        "Any r directions of an error without structure hold a share of it that depends on the "
        "shape alone. What LoftQ’s first step takes, and what white noise of the same shapes would "
        f"give: {'; '.join(shares)}. In the paper’s model: 7.2 to 8.1 % and {square:.1f} % for "
        f"4096 × 4096, 5.1 to 5.3 % and {wide:.1f} % for the MLP’s shapes.",
        "QPiSSA’s first step makes what is quantized smaller. One may expect it ahead where W’s "
        "own top r hold more than noise would. That rule names the leader in "
        f"{100 * agreement:.0f} % of the layers; PiSSA leads in {100 * leading:.0f} % of them, so "
        f"that always naming the more frequent leader is right in "
        f"{100 * max(leading, 1 - leading):.0f} %.",
    ]
    controls = claims.controls_told(rows)
    return [*sentences, f"{GRIDS} {controls}"] if controls else sentences


GRIDS = (
    "SmolLM2’s weights are 4-bit values already (16 levels in each run of 32), which gives NF4’s "
    "error a structure. Two kinds of control show the effect: ordinary weights that were rounded "
    "to such a grid or got noise of that size, and weights that were spread off their grid."
)


REPRODUCTION = Reproduction(
    name="pissa_quantization",
    title="PiSSA: the error of 4-bit weights",
    source="Meng et al. 2024, arXiv 2404.02948, QPiSSA: table of error reduction ratios",
    question="Does an adapter that takes W’s principal part leave less quantization error than one "
    "that takes the error’s own?",
    options=PissaQuantizationOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
    discuss=discuss,
)
