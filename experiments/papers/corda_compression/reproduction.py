"""Settings, and the way from a model to findings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pandas as pd

from ...console import say
from ..corpus import joined_blocks, load_texts
from ..language import block_losses, paired_error, perplexity, spread
from ..reproduction import Findings, Options, Paper
from ..subject import Subject, load_subject, place
from . import claims, figures
from .dropping import losses_by_fraction
from .inputs import observe_inputs

OWN, FOREIGN = "plots", "problems"


@dataclass
class CordaCompressionSettings(Options):
    """Settings.

    Attributes:
        model: as of `subjects.load_subject`, a causal model.
        blocks_apart: components are dropped in every so many-th block of the model; 1: in all.
        fractions: of min(out, in), ascending; the paper's 16, 128, 512 and 1024 of 4096.
        calibration_tokens: of the test text's own domain (film plots), and as many of a foreign one
            (word problems).
        few_tokens: the first so many of them, as the small calibration.
        test_tokens: of held-out plots, spread over films.
        length, batch_size: of blocks, in calibration and test.
        alpha: ASVD's exponent.
    """

    model: str = "smollm2"
    blocks_apart: int = 1
    fractions: list[float] = field(default_factory=lambda: [1 / 256, 1 / 32, 0.125, 0.25])
    calibration_tokens: int = 4096
    few_tokens: int = 512
    test_tokens: int = 1280
    length: int = 128
    batch_size: int = 4
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = all(0 < fraction < 1 for fraction in self.fractions)
        if not allowed or len(self.fractions) < 2 or sorted(set(self.fractions)) != self.fractions:
            raise ValueError(
                f"fractions={self.fractions}; allowed are two or more in 0 < x < 1, ascending"
            )
        if claims.COMPARED not in self.fractions:
            raise ValueError(
                f"fractions={self.fractions}; {claims.COMPARED:g} must be among them: the paper’s "
                "figures are compared there"
            )
        if not self.length <= self.few_tokens < self.calibration_tokens:
            raise ValueError(
                f"few_tokens={self.few_tokens}; allowed are numbers from length={self.length} to "
                f"below calibration_tokens={self.calibration_tokens}"
            )
        if self.test_tokens < 2 * self.length:
            raise ValueError(
                f"test_tokens={self.test_tokens}; allowed are two blocks of length={self.length} "
                "or more: differences are paired by block"
            )


def reproduce(settings: CordaCompressionSettings) -> Findings:
    """Measure, and judge."""
    subject = load_subject(settings.model)
    subject.model.to(place(settings.device))
    names = [layer.name for layer in subject.every(settings.blocks_apart)]
    test = joined_blocks(subject.tokenizer, load_texts(OWN, "test"), length=settings.length)
    test = spread(test, settings.test_tokens // settings.length)
    whole = block_losses(subject.model, test, settings.batch_size)
    rows = []
    for method, corpus, tokens, losses in measured(subject, names, test, settings):
        for fraction, found in losses.items():
            rows.append(
                {
                    "method": method,
                    "corpus": corpus,
                    "tokens": tokens,
                    "fraction": fraction,
                    "perplexity": perplexity(found),
                    "nats": float((found - whole).mean()),
                    "error": paired_error(found, whole),
                    "losses": found,
                }
            )
    frame = pd.DataFrame(rows)
    full = perplexity(whole)
    width = subject.model.config.hidden_size
    return Findings(
        claims=claims.all_claims(frame, full, width),
        setting={
            "model": subject.described,
            "layers": f"{len(names)} linear layers, those of "
            + ("all blocks" if settings.blocks_apart == 1 else "a few blocks"),
            "test": f"{test.numel()} tokens of held-out film plots, spread over films; perplexity "
            f"of the whole model {full:.2f}",
            "calibration": f"{settings.calibration_tokens} tokens of other films’ plots, the first "
            f"{settings.few_tokens} of them, and {settings.calibration_tokens} tokens of word "
            "problems",
            "the paper’s": "Llama-2-7B; WikiText-2; 256 and 32 samples of 2,048 tokens",
        },
        tables=[figures.table(frame, full)],
        figures=figures.charts(frame, full, width),
        discussion=discussion(settings),
    )


def discussion(settings: CordaCompressionSettings) -> list[str]:
    told = [
        "All four methods drop a projection of the weight, and all but plain SVD ask in which "
        "output directions the inputs that occur leave least; they differ in how the inputs are "
        "weighted. ASVD knows each feature’s size and no correlation; CorDA weights by R, "
        "whitening by its square root, for which the layer’s output error is least."
    ]
    if settings.model == "smollm2":
        told.append(
            "The weights come from 4-bit values: rounding noise fills their smallest components, "
            "which plain SVD drops first. Plain SVD may fare differently on weights that were "
            "trained in 16 bits."
        )
    return told


def measured(
    subject: Subject, names: list[str], test, settings: CordaCompressionSettings
) -> Iterator:
    """(method, corpus, tokens, the blocks' losses by fraction), for all that is compared."""
    shared = {"alpha": settings.alpha, "batch_size": settings.batch_size}
    say("  plain SVD")
    fractions = settings.fractions
    losses = losses_by_fraction(subject.model, names, "plain", None, fractions, test, **shared)
    yield "plain", "–", 0, losses
    for corpus, tokens, methods in (
        (OWN, settings.calibration_tokens, ("asvd", "corda", "whitened")),
        (OWN, settings.few_tokens, ("corda",)),
        (FOREIGN, settings.calibration_tokens, ("corda", "whitened")),
    ):
        blocks = joined_blocks(
            subject.tokenizer, load_texts(corpus), length=settings.length, tokens=tokens
        )
        say(f"  calibration on {blocks.numel()} tokens of {corpus}")
        inputs = observe_inputs(subject.model, names, blocks, settings.batch_size)
        for method in methods:
            say(f"  {claims.LABELS[method]}")
            losses = losses_by_fraction(
                subject.model, names, method, inputs, fractions, test, **shared
            )
            yield method, corpus, tokens, losses


PAPER = Paper(
    name="corda_compression",
    title="CorDA: dropping the smallest components",
    source="Yang et al. 2024, arXiv 2406.05223, table 1 and figure 2",
    question="Does a model keep its perplexity when every linear layer loses the components that "
    "CorDA calls the smallest?",
    settings=CordaCompressionSettings,
    reproduce=reproduce,
)
