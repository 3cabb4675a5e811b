"""QPiSSA against LoftQ: how much of a 4-bit quantizer's error does an adapter remove at the start?

    reduction = 100 (1 - ‖W - (Q + s B A)‖ / ‖W - nf4(W)‖)    in percent, by default nuclear norms

LoftQ quantizes W and gives the adapter the best rank-r part of the error. QPiSSA gives the adapter
the best rank-r part of W and quantizes the rest, which is smaller. Both may alternate T times.
The paper finds PiSSA ahead of LoftQ at every T, T = 5 ahead of T = 1, and Q and K ahead of the MLP,
in nuclear norms averaged over the layers of Llama-2-7B at r = 128.

Measured: the same ratio for `loftq` and `qpissa` of this library, by layer, rank and T, also in the
Frobenius norm, the spectral norm and as the layer's output error on real inputs. Two references
put a figure into proportion. The first is the share that the top r directions of white noise of the
same shape hold, which is all that LoftQ can get from an error without structure. The second is the
share of ‖W‖ that W's own top r hold, by which QPiSSA's first step makes the weight smaller.
Controls show the effect of weights that are 4-bit values already.

Source: Meng et al. 2024, "PiSSA", arXiv 2404.02948, section on QPiSSA with its table of error
reduction ratios and the appendix on several iterations; Li et al. 2023, "LoftQ", arXiv 2310.08659.
"""

from __future__ import annotations

import altair as alt
import pandas as pd

from .application import run
from .claim import Claim
from .drawing import LOG, methods_color, plot
from .interval import mean
from .pissa_quantization_claims import PAPERS, all_claims, at_judged_rank, points
from .pissa_quantization_rows import (
    AS_IT_IS,
    METHODS,
    NORMS,
    PARTS,
    PissaQuantizationOptions,
    measure,
)
from .reproduction import Figure, Measurement, Reproduction, Table

REDUCTION = "reduction of NF4’s error, %"
SOURCES = " ".join(f"The paper, T = {count}: {words}." for count, words in PAPERS.items())


def judged_ranks(measured: Measurement) -> dict[str, int]:
    """The judged rank of each model."""
    models = measured["models"]
    return dict(zip(models["model"], models["judged"].tolist(), strict=True))


def judge_all(measured: Measurement) -> list[Claim]:
    """The claims in the paper's order."""
    return all_claims(measured["errors"], judged_ranks(measured))


def tabulate(measured: Measurement) -> list[Table]:
    """Layers at the judged rank with white noise, PiSSA's lead by variant, and all means."""
    rows = measured["errors"]
    chosen = at_judged_rank(rows, judged_ranks(measured))
    index = ["model", "part", "rank", "error", "noise", "smaller"]
    keys = index[:3]
    means = chosen.groupby(keys, sort=False)[index[3:]].mean()
    wide = chosen.pivot_table(index=keys, columns=["method", "T"], values="nuclear", sort=False)
    wide.columns = [f"{method}, T = {count}" for method, count in wide.columns]
    layers = means.join(wide).reset_index()
    groups = ["model", "variant", "part", "rank", "T", "method"]
    norms = [norm for norm in NORMS if norm in rows]
    every = rows[rows["detailed"]].groupby(groups, sort=False, as_index=False)[norms].mean()
    return [
        Table(
            "layers",
            f"{REDUCTION}, by kind of layer at the judged rank, nuclear norm",
            layers,
            dict.fromkeys(layers.columns[3:], ".1f"),
            f"Error: NF4’s, % of ‖W‖. Noise: what the top r directions of white noise of this "
            f"shape hold. Smaller: what W loses with its own top r. {SOURCES}",
        ),
        Table(
            "leads",
            "PiSSA’s reduction minus LoftQ’s, points, at the first T and the judged rank",
            leads_by_variant(rows, judged_ranks(measured)),
            note="Weights of SmolLM2 are 4-bit values. The controls put ordinary weights on such "
            "a grid, add noise of that size, or take weights off their grid. Brackets: 95 % "
            "intervals over blocks.",
        ),
        Table(
            "all",
            f"{REDUCTION}, means over the blocks that are measured in detail",
            every,
            dict.fromkeys(norms, ".1f"),
        ),
    ]


def leads_by_variant(rows: pd.DataFrame, judged: dict[str, int]) -> pd.DataFrame:
    """PiSSA minus LoftQ at the first T in the detailed blocks, by model and variant."""
    at_rank = rows["rank"] == rows["model"].map(judged)
    some = rows[at_rank & rows["detailed"] & (rows["T"] == rows["T"].min())]
    index = ["model", "variant", "block"]
    table = some.pivot_table(index=index, columns="method", values="nuclear", sort=False)
    leads = (table["pissa"] - table["loftq"]).groupby(index[:2], sort=False)
    return leads.apply(lambda values: points(mean(values.tolist()))).rename("lead").reset_index()


def draw(measured: Measurement) -> list[Figure]:
    """Reductions by rank, and PiSSA's lead by rank and kind of layer."""
    rows = measured["errors"]
    some = rows[(rows["variant"] == AS_IT_IS) & rows["detailed"]]
    ranks = some.groupby(["model", "rank", "method", "T"], as_index=False)["nuclear"].mean()
    ranks = ranks[ranks["nuclear"] > 0]
    first = some[some["T"] == some["T"].min()]
    leads = first.pivot_table(
        index=["model", "part", "rank"], columns="method", values="nuclear", sort=False
    )
    leads = (leads["pissa"] - leads["loftq"]).rename("lead").reset_index()
    bound = float(leads["lead"].abs().max()) or 1.0
    shades = alt.Scale(scheme="pinkyellowgreen", domain=[-bound, bound])
    return [
        Figure(
            "ranks",
            "How much of NF4’s error is taken back, by rank",
            f"Mean over layers, nuclear norm. {SOURCES}",
            plot(
                ranks,
                "line",
                alt.X("rank:Q", scale=LOG),
                alt.Y("nuclear:Q", title=REDUCTION, scale=LOG),
                color=methods_color(list(METHODS)),
                dash="T",
                panel="model",
            ),
            width=None,
        ),
        Figure(
            "leads",
            f"Where PiSSA is ahead of LoftQ, T = {rows['T'].min()}",
            "PiSSA’s reduction minus LoftQ’s in the nuclear norm, points, mean over layers.",
            plot(
                leads,
                "rect",
                alt.X("rank:O", axis=alt.Axis(labelAngle=0)),
                alt.Y("part:N", sort=list(PARTS), title=None),
                color=alt.Color("lead:Q", scale=shades, legend=None),
                text="lead",
                panel="model",
                height=alt.Step(24),
            ),
            width=None,
        ),
    ]


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
)

if __name__ == "__main__":
    run(REPRODUCTION)
