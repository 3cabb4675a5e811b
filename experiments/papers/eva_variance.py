"""EVA: A holds the directions in which a layer's inputs vary most.

The paper states that these directions explain most of the inputs' variance and that a few batches
find them. With them B receives the largest first gradient that an A with orthonormal rows can give
it, if the gradients of tokens are independent of the inputs. All are measured on films that EVA has
not seen. On its own inputs an A explains the variance by construction.

Source: Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation",
arXiv 2410.07170, theorems 3.1 and 3.2, algorithm 1 (tau), and the table of the initialization's
time.
"""

from __future__ import annotations

import altair as alt
import pandas as pd

from . import eva_variance_claims as claims
from .application import run
from .claim import Claim
from .drawing import LOG, color, methods_color, plot
from .eva_variance_rows import EvaVarianceOptions, measure
from .reproduction import Figure, Measurement, Reproduction, Table, summary_table
from .subject import short_name


def judge_all(measured: Measurement) -> list[Claim]:
    """Three claims on inputs, two on gradients, one on ranks and one on cost."""
    options, gradients = measured.options, measured["gradients"]
    return [
        claims.explains(measured["explained"], options.rank),
        claims.converges(measured["turning"]),
        claims.same_elsewhere(measured["convergence"]),
        claims.larger_than_random(gradients),
        claims.largest_of_all(gradients),
        claims.fewer_parameters(measured["ranks"], options.rho),
        claims.cheap(measured["costs"].to_dict("records")),
    ]


def tabulate(measured: Measurement) -> list[Table]:
    """Medians over layers: gradients, variance, convergence and ranks; and the costs."""
    gradients = measured["gradients"].copy()
    first = gradients[gradients["method"] == "kaiming"].set_index(["model", "layer"])["raw"]
    places = pd.MultiIndex.from_frame(gradients[["model", "layer"]])
    gradients["E‖∇B‖² / kaiming’s"] = gradients["raw"].to_numpy() / first[places].to_numpy()
    shown = ["E‖∇B‖² / kaiming’s", "span", "ceiling"]
    tables = (
        (
            gradients,
            ["model", "method"],
            shown,
            "gradients",
            "The first gradient of B by method",
            "At s = 1, over batches that no method has seen. span: the share of E‖G‖² in A’s row "
            "space; ceiling: the most possible.",
        ),
        (
            measured["explained"],
            ["model", "kind", "rank", "method"],
            ["seen", "fresh", "random"],
            "variance",
            "Share of the inputs’ variance that A’s row space explains",
            "seen: on EVA’s own data; fresh: on other films; random: r / n.",
        ),
        (
            measured["convergence"],
            ["model", "against", "batches", "order"],
            ["overlap", "kept"],
            "convergence",
            "Overlap of EVA’s subspace after some batches with others",
            "kept: the variance of other films’ inputs that it explains, of the most possible.",
        ),
        (
            measured["turning"],
            ["model", "batches"],
            ["cosine"],
            "turning",
            "The least cosine of a component with the one of a batch before",
            f"EVA stops at {claims.TAU}.",
        ),
        (measured["ranks"], ["model", "kind"], ["rank"], "ranks", "Ranks that EVA chooses"),
    )
    return [
        *(summary_table(*table, how="median") for table in tables),
        Table(
            "costs",
            f"What a start costs ({short_name(measured.options.cost_model)})",
            measured["costs"],
            {"seconds": ".2f", "steps": ".1f", "share": ".2f", "paper": ".1f"},
            "Wall clock without injection; the same in training steps, and in percent of an epoch "
            "here and in the paper, whose epoch is many times longer.",
        ),
    ]


def draw(measured: Measurement) -> list[Figure]:
    """Explained variance by rank, and the share of the gradient by method."""
    explained, gradients = measured["explained"], measured["gradients"]
    by = ["model", "kind", "rank"]
    variance = explained[explained["method"] == "eva"].groupby(by, sort=False)["fresh"].median()
    variance = variance.reset_index()
    span = gradients.groupby(["model", "method"], as_index=False)["span"].median()
    span = span.sort_values("span", ascending=False)
    return [
        Figure(
            "variance",
            "Variance that the first directions explain",
            "Measured on films that EVA has not seen, median over blocks.",
            plot(
                variance,
                "line",
                alt.X("rank:Q", scale=alt.Scale(type="log", base=2)),
                alt.Y("fresh:Q", title="share of the variance", axis=alt.Axis(format="%")),
                color=color("kind", variance["kind"].unique().tolist()),
                panel="model",
            ),
            width=None,
        ),
        Figure(
            "gradients",
            "The share of the gradient’s energy in the row space of A",
            "Median over layers. A random A holds r / n.",
            plot(
                span,
                "point",
                alt.X("span:Q", scale=LOG, axis=alt.Axis(format="~%"), title="share"),
                alt.Y("method:N", sort=span["method"].tolist(), title=None),
                color=methods_color(span["method"].unique().tolist(), legend=False),
                panel="model",
                height=alt.Step(17),
            ),
            width=None,
        ),
    ]


REPRODUCTION = Reproduction(
    name="eva_variance",
    title="EVA: explained variance",
    source="Paischer et al. 2024, arXiv 2410.07170, theorems 3.1 and 3.2",
    question="Do a layer’s first input directions explain most of their variance, are they found "
    "in few batches, and do they give B the largest first gradient?",
    options=EvaVarianceOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
)

if __name__ == "__main__":
    run(REPRODUCTION)
