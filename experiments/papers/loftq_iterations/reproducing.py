"""Both models measured, every claim judged."""

from __future__ import annotations

import pandas as pd

from ...console import say
from ..claim import Claim
from ..reproduction import Findings, Paper
from ..subject import short_name
from . import closed_form, iterating, showing
from .measuring import (
    Frames,
    Study,
    encoder_study,
    language_study,
    measure_starts,
)
from .settings import LoftqIterationsSettings
from .training import fine_tunings


def reproduce(settings: LoftqIterationsSettings) -> Findings:
    """Measure, and judge."""
    say(f"  {settings.encoder}: looking at the layers’ inputs")
    first = encoder_study(settings)
    cases = [
        (bits, rank)
        for bits in settings.bits
        for rank in settings.ranks
        if bits < 8 or rank == max(settings.ranks)
    ]
    encoder = measure_starts(
        first, cases, settings.iterations, settings.order_iterations, closed_form_last=True
    )
    trained = fine_tunings(first, settings, max(settings.order_iterations))
    say(f"  {settings.language_model}: looking at the layers’ inputs")
    second = language_study(settings)
    cases = [(bits, rank) for bits in settings.language_bits for rank in settings.language_ranks]
    language = measure_starts(
        second, cases, settings.language_iterations, [], closed_form_last=False
    )
    original = second.measure.original_losses().perplexity
    return Findings(
        claims=claims(encoder, language, trained, original, trained_on(settings)),
        setting=described(first, second, settings),
        tables=[
            showing.models_table(
                encoder.models,
                "encoder",
                f"Every start of {short_name(settings.encoder)}",
                "hidden states",
            ),
            showing.models_table(
                language.models,
                "language_model",
                f"Every start of {short_name(settings.language_model)}",
                "KL",
            ),
        ],
        figures=[
            showing.iterations_figure(encoder.models),
            showing.layers_figure(encoder.layers),
            showing.agreement_figure(encoder.models),
            showing.perplexity_figure(language.models, original),
            showing.divergence_figure(language.models),
        ],
        discussion=discussion(encoder),
    )


def claims(
    encoder: Frames, language: Frames, trained: pd.DataFrame, original: float, setting: str
) -> list[Claim]:
    models = pd.concat([encoder.models, language.models], ignore_index=True)
    layers = pd.concat([encoder.layers, language.layers], ignore_index=True)
    texts = pd.concat([encoder.texts, language.texts], ignore_index=True)
    return [
        iterating.weight_claim(encoder.paths),
        iterating.output_claim(layers),
        iterating.model_claim(texts),
        closed_form.lower_claim(models),
        closed_form.rank_claim(layers, texts),
        closed_form.perplexity_claim(language.models, language.texts, original),
        closed_form.diagonal_claim(language.texts, language.models),
        closed_form.correlation_claim(models),
        closed_form.own_base_claim(layers),
        closed_form.any_base_claim(encoder.layers),
        iterating.order_claim(encoder.models),
        iterating.training_claim(trained, setting),
    ]


def described(first: Study, second: Study, settings: LoftqIterationsSettings) -> dict[str, str]:
    def blocks(every: int) -> str:
        return "all layers" if every == 1 else f"the layers of every {every}. block"

    return {
        "encoder": f"{first.ground.subject.described}; {blocks(settings.encoder_every)} quantised "
        f"({len(first.ground.targets)}); {first.ground.calibration.tokens:,} tokens of film "
        f"reviews for calibration, {first.held_out.tokens:,} of other films held out",
        "language model": f"{second.ground.subject.described}; {blocks(settings.language_every)} "
        f"quantised ({len(second.ground.targets)}), errors of {len(second.measured)} measured; "
        f"{second.ground.calibration.tokens:,} tokens of film plots for calibration, "
        f"{second.held_out.tokens:,} of other films held out",
        "quantisers": "NF4 and NF2 with one scale for 64 weights, int8 with one for a row; the "
        "papers’ 4.25 bits are 4-bit blocks of 32 with a scale of 8 bits",
        "fine-tuning": trained_on(settings),
        "the papers’": "TinyLlama-1.1B on wikitext2 (QERA); DeBERTaV3-base on GLUE, 2 bits (LoftQ)",
    }


def trained_on(settings: LoftqIterationsSettings) -> str:
    return (
        f"{short_name(settings.encoder)} from 2 bits, r = {max(settings.ranks)}, the adapter and a "
        "new head, "
        f"{settings.training_steps} steps of {settings.training_batch} film reviews, learning rate "
        f"{settings.learning_rate:g}, {len(settings.training_seeds)} orders of the data, "
        f"{settings.validation_sentences} held-out reviews"
    )


def discussion(encoder: Frames) -> list[str]:
    shares = showing.shares(encoder.models)
    some = shares[shares["bits"] == 4].groupby("method")["output"].min()
    return [
        "QERA minimises a layer’s output error for the base that it is given. By base, in per cent "
        "of plain quantisation’s output error at 4 bits, the least over T and ranks: QERA on the "
        f"plain base {some['qera']:.0f}, the closed form on LoftQ’s base "
        f"{some['loftq + qera']:.0f}, LoftQ {some['loftq']:.0f}, SVD first "
        f"{some['svd first']:.0f}.",
        "An error of one layer, on the original model’s inputs, leaves out that every layer of the "
        "quantised model reads inputs that are wrong already; the whole model’s error has it.",
    ]


PAPER = Paper(
    name="loftq_iterations",
    title="LoftQ and QERA: weights, outputs, and the order of things",
    source="Li et al. 2023, arXiv 2310.08659, algorithm 1 and the comparison of both orders; Zhang "
    "et al. 2024, arXiv 2410.06040, theorems 1 and 2, perplexity of TinyLlama",
    question="Do LoftQ’s iterations lower what matters, does their order, and is a closed form for "
    "the outputs better?",
    settings=LoftqIterationsSettings,
    reproduce=reproduce,
)
