"""LoftQ and QERA: do LoftQ's iterations or its order matter, and is a closed form better?

LoftQ alternates Q = quant(W - s B A) and s B A = SVD_r(W - Q). Each iteration is meant to bring
Q + s B A nearer to W. The output of a model depends on W x, and QERA's authors show that the error
of the outputs need not fall with T. Their closed form reads the inputs' second moment R. For
Q = quant(W) it leaves the least output error that a correction of rank r can leave. LoftQ's
authors compare two orders: quantize first (LoftQ), or SVD first (QPiSSA's alternation, here with an
SVD at the end too).

Measured, by bits, rank and T: the error of the weights, of the layers' outputs on held-out text,
and of the whole model with quantized blocks. An encoder in float32 has the full grid and short
fine-tunings of adapter and head from both orders at 2 bits. A language model has the error of the
logits and the perplexities, by bits and rank.

Source: Li et al. 2023, arXiv 2310.08659, algorithm 1 and the table of both orders; Zhang et al.
2024, arXiv 2410.06040, theorems 1 and 2, and its perplexities.
"""

from __future__ import annotations

import altair as alt
import pandas as pd

from . import loftq_iterations_closed_form_claims as closed_form_claims
from . import loftq_iterations_iteration_claims as iteration_claims
from .application import run
from .claim import Claim
from .drawing import LOG, methods_color, plot
from .loftq_iterations_iteration_claims import CASE, ERRORS
from .loftq_iterations_rows import LoftqIterationsOptions, measure
from .loftq_iterations_starts import METHODS, PLAIN
from .reproduction import Figure, Measurement, Reproduction, Table


def original_perplexity(measured: Measurement) -> float:
    """The language model's perplexity before it was quantized."""
    return float(measured["original"]["perplexity"].iloc[0])


def judge_all(measured: Measurement) -> list[Claim]:
    """Three claims on iterations, seven on the closed form, and two on the order."""
    models, layers, texts = (
        pd.concat([measured[f"encoder {name}"], measured[f"language {name}"]], ignore_index=True)
        for name in ("models", "layers", "texts")
    )
    language, original = measured["language models"], original_perplexity(measured)
    blocks = measured["language texts"]
    return [
        iteration_claims.weight_claim(measured["encoder paths"]),
        iteration_claims.output_claim(layers),
        iteration_claims.model_claim(texts),
        closed_form_claims.lower_claim(models),
        closed_form_claims.rank_claim(layers, texts),
        closed_form_claims.perplexity_claim(language, blocks, original),
        closed_form_claims.diagonal_claim(blocks, language),
        closed_form_claims.correlation_claim(models),
        closed_form_claims.own_base_claim(layers),
        closed_form_claims.any_base_claim(measured["encoder layers"]),
        iteration_claims.order_claim(measured["encoder models"]),
        iteration_claims.training_claim(measured["trained"]),
    ]


def tabulate(measured: Measurement) -> list[Table]:
    """Every start of both models."""
    titles = {"encoder": measured.options.encoder, "language": measured.options.language_model}
    note = (
        "Relative errors, means over the layers; output on held-out text, seen on the text of the "
        "calibration. error: of the last hidden states, or the KL of the next token."
    )
    return [
        Table(
            name,
            f"Every start of {title}",
            measured[f"{name} models"].drop(columns="model").dropna(axis=1),
            dict.fromkeys(["weight", "output", "seen", "error"], ".4f") | {"perplexity": ".2f"},
            note,
        )
        for name, title in titles.items()
    ]


def shares(models: pd.DataFrame) -> pd.DataFrame:
    """Every error in percent of what plain quantization at the same bits and rank has."""
    places = pd.MultiIndex.from_frame(models[CASE])
    plain = models[models["method"] == PLAIN].set_index(CASE)
    shown = models.copy()
    for name in ERRORS:
        shown[name] = 100 * models[name].to_numpy() / plain[name].reindex(places).to_numpy()
    return shown


def draw(measured: Measurement) -> list[Figure]:
    """The encoder's errors by iteration, and the language model's by rank."""
    encoder, language = measured["encoder models"], measured["language models"]
    some = shares(encoder[encoder["rank"] == encoder["rank"].max()])
    some = some[some["method"] != PLAIN].melt(
        ["method", "T", "bits"], list(ERRORS), var_name="measure", value_name="share"
    )
    bits = some["bits"].astype(str)
    some["panel"] = some["measure"].map(ERRORS) + ", " + bits + " bits"
    kl = language.assign(
        panel=language["bits"].astype(str) + " bits",
        start=language["method"] + " T = " + language["T"].astype(str),
    )
    methods = [name for name in METHODS if name in set(encoder["method"])]
    return [
        Figure(
            "iterations",
            f"The encoder’s errors against iterations, rank {encoder['rank'].max()}",
            "In percent of what plain quantization at the same bits loses. T = 0: not iterated.",
            plot(
                some,
                "line",
                alt.X("T:Q", title="iterations T"),
                alt.Y("share:Q", title="% of plain", scale=alt.Scale(zero=False)),
                color=methods_color(methods),
                panel="panel",
                shared=False,
                columns=3,
                width=180,
                height=140,
            ),
            width=None,
        ),
        Figure(
            "divergence",
            "The language model’s error by rank and bits",
            "KL(original ‖ quantized) of the next token on held-out film plots.",
            plot(
                kl[["start", "method", "rank", "panel", "error"]],
                "line",
                alt.X("rank:O", axis=alt.Axis(labelAngle=0)),
                alt.Y("error:Q", title="KL, nats a token", scale=LOG),
                color=methods_color(methods),
                detail="start:N",
                panel="panel",
                shared=False,
                columns=3,
                width=200,
            ),
            width=None,
        ),
    ]


REPRODUCTION = Reproduction(
    name="loftq_iterations",
    title="LoftQ and QERA: weights, outputs, and the order of things",
    source="Li et al. 2023, arXiv 2310.08659, algorithm 1 and the comparison of both orders; Zhang "
    "et al. 2024, arXiv 2410.06040, theorems 1 and 2, perplexity of TinyLlama",
    question="Do LoftQ’s iterations lower what matters, does their order, and is a closed form for "
    "the outputs better?",
    options=LoftqIterationsOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
)

if __name__ == "__main__":
    run(REPRODUCTION)
