"""The reproduction as a whole."""

from __future__ import annotations

import pandas as pd

from experiments.console import say
from experiments.papers.findings import Findings
from experiments.papers.paper import Paper
from experiments.papers.pissa_quantization.judging import at_judged_rank, claims, of_grids
from experiments.papers.pissa_quantization.measuring import chosen_layers, measure, width_of
from experiments.papers.pissa_quantization.pictures import figures
from experiments.papers.pissa_quantization.settings import PissaQuantizationSettings
from experiments.papers.pissa_quantization.tables import tables
from experiments.papers.pissa_quantization.white_noise import leading_share
from experiments.papers.subjects import load_subject

SHORT = {"minilm": "MiniLM", "smollm2": "SmolLM2-135M"}


def reproduce(settings: PissaQuantizationSettings) -> Findings:
    """Measure every model, and judge."""
    rows, judged, widths, models = [], {}, {}, []
    for name in settings.models:
        subject = load_subject(name)
        layers = chosen_layers(subject, settings.blocks)
        blocks = sorted({layer.block for layer in layers})
        say(f"  {name}: {len(layers)} layers of {len(blocks)} blocks")
        short = SHORT.get(name, name)
        widths[short] = width_of(subject)
        judged[short] = settings.judged_rank(widths[short])
        told = ", ".join(map(str, blocks))
        models.append(f"{subject.described}; {len(layers)} layers: blocks {told}")
        rows += [{**row, "model": short} for row in measure(subject, settings)]
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
    by_model = [
        f"{model}: {loftq[model].mean():.1f} % where noise of the same shapes would give "
        f"{noise[model].mean():.1f} %"
        for model in dict.fromkeys(rows["model"])
    ]
    square, wide = (100 * leading_share(side, 4096, 128) for side in (4096, 11008))
    said = [
        f"LoftQ’s first step takes little more than what any r directions of white noise hold "
        f"({'; '.join(by_model)}), which depends on the shape alone. The paper’s own figures are "
        f"of that kind: {square:.1f} % by the law for 4096 × 4096 against its 7.2 to 8.1, "
        f"{wide:.1f} % for the MLP’s shapes against its 5.1 to 5.3.",
        "QPiSSA’s first step makes smaller what is quantised, so that it is ahead where W’s own "
        "top r hold more than noise would: that rule names the leader in "
        f"{100 * agreement:.0f} % of the layers.",
    ]
    controls = of_grids(rows)
    return [*said, f"{controls} {GRIDS}"] if controls else said


GRIDS = (
    "SmolLM2’s weights here are 4-bit values already, on a grid of 16 levels a run of 32: NF4’s "
    "error of such weights has a structure of its own, which ordinary weights’ has not. Where "
    "these two controls point the same way, the comparison on SmolLM2 is shifted by its origin."
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
