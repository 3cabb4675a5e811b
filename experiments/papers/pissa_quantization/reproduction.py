"""The reproduction as a whole."""

from __future__ import annotations

import pandas as pd

from ...console import say
from ..reproduction import Findings, Paper
from ..subject import load_subject
from .judging import (
    at_judged_rank,
    claims,
    controls_told,
)
from .measuring import chosen_layers, measure, width_of
from .pictures import figures
from .settings import PissaQuantizationSettings
from .tables import tables
from .white_noise import leading_share


def reproduce(settings: PissaQuantizationSettings) -> Findings:
    """Measure every model, and judge."""
    rows, judged, widths, models = [], {}, {}, []
    for name in settings.models:
        subject = load_subject(name)
        layers = chosen_layers(subject, settings.blocks)
        blocks = sorted({layer.block for layer in layers})
        say(f"  {name}: {len(layers)} layers of {len(blocks)} blocks")
        widths[subject.short] = width_of(subject)
        judged[subject.short] = settings.judged_rank(widths[subject.short])
        told = ", ".join(map(str, blocks))
        models.append(f"{subject.described}; {len(layers)} layers: blocks {told}")
        rows += [{**row, "model": subject.short} for row in measure(subject, settings)]
    frame = pd.DataFrame(rows)
    share = f"{100 * settings.share:.3g} %"
    ranks = ", ".join(f"{rank} on {model}" for model, rank in judged.items())
    names = {model: f"{model} (width {width})" for model, width in widths.items()}
    return Findings(
        claims=claims(frame, judged),
        setting={
            "models": ". ".join(models),
            "judged at": f"r = {ranks}: {share} of the width, the paper’s 128 of 4096; other ranks "
            f"and controls on {settings.detailed} of the blocks",
            "quantiser": "NF4 in blocks of 64, of the library (bitsandbytes’ values to the bit)",
            "inputs": f"for the output error only: about {settings.tokens} tokens of film plots, "
            "of film reviews for MiniLM",
            "the paper’s": "Llama-2-7B, r = 128, and Llama-3-8B, r = 64; nuclear norm, all layers",
        },
        tables=tables(frame, judged, widths),
        figures=figures(frame, judged, widths, names),
        discussion=discussion(frame, judged),
    )


def discussion(rows: pd.DataFrame, judged: dict[str, int]) -> list[str]:
    """What the two references and the controls say."""
    chosen = at_judged_rank(rows, judged)
    first = chosen[chosen["T"] == chosen["T"].min()]
    layers = first.pivot_table(
        index=["model", "part", "block"], columns="method", values=["nuclear", "noise", "smaller"]
    )
    loftq, noise = layers["nuclear", "loftq"], layers["noise", "loftq"]
    lead = layers["nuclear", "pissa"] - loftq
    expected = layers["smaller", "pissa"] - noise
    agreement = float(((lead > 0) == (expected > 0)).mean())
    leading = float((lead > 0).mean())
    by_model = [
        f"{model}: {loftq[model].mean():.1f} % and {noise[model].mean():.1f} %"
        for model in dict.fromkeys(rows["model"])
    ]
    square, wide = (100 * leading_share(side, 4096, 128) for side in (4096, 11008))
    said = [
        "Any r directions of an error without structure hold a share of it that depends on the "
        "shape alone. What LoftQ’s first step takes, and what white noise of the same shapes would "
        f"give: {'; '.join(by_model)}. In the paper’s model: 7.2 to 8.1 % and {square:.1f} % for "
        f"4096 × 4096, 5.1 to 5.3 % and {wide:.1f} % for the MLP’s shapes.",
        "QPiSSA’s first step makes smaller what is quantised, so that one may expect it ahead "
        "where W’s own top r hold more than noise would. That rule names the leader in "
        f"{100 * agreement:.0f} % of the layers; PiSSA leads in {100 * leading:.0f} % of them, so "
        f"that always naming the more frequent leader is right in "
        f"{100 * max(leading, 1 - leading):.0f} %.",
    ]
    controls = controls_told(rows)
    return [*said, f"{GRIDS} {controls}"] if controls else said


GRIDS = (
    "Weights that are 4-bit values already, as SmolLM2’s are here (16 levels a run of 32), give "
    "NF4’s error a structure of its own. Two kinds of control say what that does: ordinary weights "
    "put on such a grid (and, beside it, with noise of that size), and weights spread off theirs."
)


PAPER = Paper(
    name="pissa_quantization",
    title="PiSSA: the error of 4-bit weights",
    source="Meng et al. 2024, arXiv 2404.02948, QPiSSA: table of error reduction ratios",
    question="Does an adapter that takes W’s principal part leave less quantisation error than one "
    "that takes the error’s own?",
    settings=PissaQuantizationSettings,
    reproduce=reproduce,
)
