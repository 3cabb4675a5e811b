"""The way from an encoder and a language model to the claims about LoftQ and QERA."""

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
from ..subject import short_name
from . import closed_form_claims, figures, iteration_claims
from .options import LoftqIterationsOptions
from .study import (
    Study,
    encoder_study,
    language_study,
    measure_starts,
)
from .training import fine_tunings

FRAMES = ("layers", "models", "paths", "texts")
"""The frames of each model; see `experiments.papers.loftq_iterations.study.Frames`."""


def measure(options: LoftqIterationsOptions) -> Measurement:
    """Measure every start of both models, and train the encoder from three of them."""
    say(f"  {options.encoder}: looking at the layers’ inputs")
    first = encoder_study(options)
    cases = [
        (bits, rank)
        for bits in options.bits
        for rank in options.ranks
        if bits < 8 or rank == max(options.ranks)
    ]
    encoder = measure_starts(
        first, cases, options.iterations, options.order_iterations, closed_form_last=True
    )
    trained = fine_tunings(first, options, max(options.order_iterations))
    say(f"  {options.language_model}: looking at the layers’ inputs")
    second = language_study(options)
    cases = [(bits, rank) for bits in options.language_bits for rank in options.language_ranks]
    language = measure_starts(
        second, cases, options.language_iterations, [], closed_form_last=False
    )
    original = second.measure.original_losses().perplexity
    frames = {
        **{f"encoder {name}": getattr(encoder, name) for name in FRAMES},
        **{f"language {name}": getattr(language, name) for name in FRAMES},
        "trained": trained,
        "original": pd.DataFrame([{"perplexity": original}]),
    }
    return Measurement(options, frames, described(first, second, options))


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
        iteration_claims.training_claim(measured["trained"], trained_on(measured.options)),
    ]


def tabulate(measured: Measurement) -> list[Table]:
    """Every start of both models."""
    encoder, language = measured.options.encoder, measured.options.language_model
    return [
        figures.models_table(
            measured["encoder models"],
            "encoder",
            f"Every start of {short_name(encoder)}",
            "hidden states",
        ),
        figures.models_table(
            measured["language models"],
            "language_model",
            f"Every start of {short_name(language)}",
            "KL",
        ),
    ]


def draw(measured: Measurement) -> list[Figure]:
    """Errors by iteration, layer, start, bits and rank."""
    encoder, language = measured["encoder models"], measured["language models"]
    return [
        figures.iterations_figure(encoder),
        figures.layers_figure(measured["encoder layers"]),
        figures.agreement_figure(encoder),
        figures.perplexity_figure(language, original_perplexity(measured)),
        figures.divergence_figure(language),
    ]


def described(first: Study, second: Study, options: LoftqIterationsOptions) -> dict[str, str]:
    """The models, quantizers and data in words."""

    def blocks(every: int) -> str:
        return "all layers" if every == 1 else f"the layers of one of {every} blocks"

    return {
        "encoder": f"{first.ground.subject.described}; {blocks(options.encoder_every)} quantized "
        f"({len(first.ground.targets)}); {first.ground.calibration.tokens:,} tokens of film "
        f"reviews for calibration, {first.held_out.tokens:,} of other films held out",
        "language model": f"{second.ground.subject.described}; {blocks(options.language_every)} "
        f"quantized ({len(second.ground.targets)}), errors of {len(second.measured)} measured; "
        f"{second.ground.calibration.tokens:,} tokens of film plots for calibration, "
        f"{second.held_out.tokens:,} of other films held out",
        "quantizers": "NF4 and NF2 with one scale for 64 weights, int8 with one for a row; the "
        "papers’ 4.25 bits are 4-bit blocks of 32 with a scale of 8 bits",
        "fine-tuning": trained_on(options),
        "the papers’": "TinyLlama-1.1B on wikitext2 (QERA); DeBERTaV3-base on GLUE, 2 bits (LoftQ)",
    }


def trained_on(options: LoftqIterationsOptions) -> str:
    """The fine-tuning in words."""
    return (
        f"{short_name(options.encoder)} from 2 bits, r = {max(options.ranks)}, the adapter and a "
        "new head, "
        f"{options.training_steps} steps of {options.training_batch} film reviews, learning rate "
        f"{options.learning_rate:g}, {len(options.training_seeds)} orders of the data, "
        f"{options.validation_sentences} held-out reviews"
    )


def discuss(measured: Measurement) -> list[str]:
    """Compare the closed form on different bases."""
    shares = figures.shares(measured["encoder models"])
    some = shares[shares["bits"] == 4].groupby("method")["output"].min()
    return [
        "QERA minimizes a layer’s output error for the base that it is given. By base, in percent "
        "of plain quantization’s output error at 4 bits, the least over T and ranks: QERA on the "
        f"plain base {some['qera']:.0f}, the closed form on LoftQ’s base "
        f"{some['loftq + qera']:.0f}, LoftQ {some['loftq']:.0f}, SVD first "
        f"{some['svd first']:.0f}.",
        "The error of one layer is measured on the original model’s inputs. In the quantized model "
        "each layer reads inputs that have errors already; only the whole model’s error includes "
        "this.",
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
    discuss=discuss,
)
