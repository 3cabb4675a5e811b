"""What CorDA's compression is measured on, and the way from a model to claims."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from ...console import say
from ..claim import Claim
from ..corpus import joined_blocks, load_texts
from ..language import block_losses, paired_error, perplexity, spread
from ..reproduction import (
    Figure,
    Measurement,
    Options,
    Reproduction,
    Table,
    require,
)
from ..subject import Subject, load_subject, place
from . import claims, figures
from .dropping import losses_by_fraction
from .inputs import observe_inputs

OWN, FOREIGN = "plots", "problems"


@dataclass
class CordaCompressionOptions(Options):
    """What is dropped, and the text for calibration and test.

    Attributes:
        model: a causal model, as `load_subject` takes it.
        blocks_apart: components are dropped in one of so many blocks of the model; 1 means in all.
        fractions: the dropped shares of min(out, in), ascending. The paper drops 16, 128, 512 and
            1024 of 4096.
        calibration_tokens: tokens of film plots, the domain of the test, and as many tokens of
            word problems, a foreign domain.
        few_tokens: the small calibration uses so many of the first of them.
        test_tokens: tokens of held-out plots, spread over films.
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
        ascending = sorted(set(self.fractions)) == self.fractions and len(self.fractions) > 1
        inside = all(0 < fraction < 1 for fraction in self.fractions)
        require(self, "fractions", ascending and inside, "two or more in 0 < x < 1, ascending")
        compared = f"a list with {claims.COMPARED:g}, where the paper’s figures are compared"
        require(self, "fractions", claims.COMPARED in self.fractions, compared)
        require(
            self,
            "few_tokens",
            self.length <= self.few_tokens < self.calibration_tokens,
            f"from length={self.length} to below calibration_tokens={self.calibration_tokens}",
        )
        require(
            self,
            "test_tokens",
            self.test_tokens >= 2 * self.length,
            f"two blocks of length={self.length} or more, because differences are paired by block",
        )


def measure(options: CordaCompressionOptions) -> Measurement:
    """Measure the perplexity for each method, calibration and dropped share."""
    subject = load_subject(options.model)
    subject.model.to(place(options.device))
    names = [layer.name for layer in subject.every(options.blocks_apart)]
    test = joined_blocks(subject.tokenizer, load_texts(OWN, "test"), length=options.length)
    test = spread(test, options.test_tokens // options.length)
    whole = block_losses(subject.model, test, options.batch_size)
    rows = []
    for method, corpus, tokens, losses in compressed_losses(subject, names, test, options):
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
    full = perplexity(whole)
    model = {"perplexity": full, "width": subject.model.config.hidden_size}
    facts = {
        "model": subject.described,
        "layers": f"{len(names)} linear layers, those of "
        + ("all blocks" if options.blocks_apart == 1 else "a few blocks"),
        "test": f"{test.numel()} tokens of held-out film plots, spread over films; perplexity "
        f"of the whole model {full:.2f}",
        "calibration": f"{options.calibration_tokens} tokens of other films’ plots, the first "
        f"{options.few_tokens} of them, and {options.calibration_tokens} tokens of word problems",
        "the paper’s": "Llama-2-7B; WikiText-2; 256 and 32 samples of 2,048 tokens",
    }
    frames = {"compressed": pd.DataFrame(rows), "model": pd.DataFrame([model])}
    return Measurement(options, frames, facts)


def compressed_losses(
    subject: Subject,
    names: list[str],
    test: Int[Tensor, "blocks length"],
    options: CordaCompressionOptions,
) -> Iterator[tuple[str, str, int, dict[float, Tensor]]]:
    """Yield method, corpus, tokens, and the blocks' losses by dropped share."""
    shared = {"alpha": options.alpha, "batch_size": options.batch_size}
    say("  plain SVD")
    fractions = options.fractions
    losses = losses_by_fraction(subject.model, names, "plain", None, fractions, test, **shared)
    yield "plain", "–", 0, losses
    for corpus, tokens, methods in (
        (OWN, options.calibration_tokens, ("asvd", "corda", "whitened")),
        (OWN, options.few_tokens, ("corda",)),
        (FOREIGN, options.calibration_tokens, ("corda", "whitened")),
    ):
        blocks = joined_blocks(
            subject.tokenizer, load_texts(corpus), length=options.length, tokens=tokens
        )
        say(f"  calibration on {blocks.numel()} tokens of {corpus}")
        inputs = observe_inputs(subject.model, names, blocks, options.batch_size)
        for method in methods:
            say(f"  {claims.LABELS[method]}")
            losses = losses_by_fraction(
                subject.model, names, method, inputs, fractions, test, **shared
            )
            yield method, corpus, tokens, losses


def whole_model(measured: Measurement) -> tuple[float, int]:
    """The perplexity and the width of the whole model."""
    row = measured["model"].iloc[0]
    return float(row["perplexity"]), int(row["width"])


def judge_all(measured: Measurement) -> list[Claim]:
    """Four claims of the paper, and one question that this project adds."""
    return claims.all_claims(measured["compressed"], *whole_model(measured))


def tabulate(measured: Measurement) -> list[Table]:
    """Perplexity by method, calibration and dropped share."""
    return [figures.table(measured["compressed"], whole_model(measured)[0])]


def draw(measured: Measurement) -> list[Figure]:
    """Perplexity against the dropped share, and the effect of the calibration."""
    return figures.charts(measured["compressed"], *whole_model(measured))


def discuss(measured: Measurement) -> list[str]:
    """What the methods have in common, and a limit of this model."""
    sentences = [
        "All four methods drop a projection of the weight. All but plain SVD choose the output "
        "directions in which the inputs that occur leave least. They differ in how they weight "
        "the inputs. ASVD knows each feature’s size and no correlation. CorDA weights by R, "
        "whitening by its square root, for which the layer’s output error is least."
    ]
    if measured.options.model == "smollm2":
        sentences.append(
            "The weights come from 4-bit values: rounding noise fills their smallest components, "
            "which plain SVD drops first. Plain SVD may do better or worse on weights that were "
            "trained in 16 bits."
        )
    return sentences


REPRODUCTION = Reproduction(
    name="corda_compression",
    title="CorDA: dropping the smallest components",
    source="Yang et al. 2024, arXiv 2406.05223, table 1 and figure 2",
    question="Does a model keep its perplexity when every linear layer loses the components that "
    "CorDA calls the smallest?",
    options=CordaCompressionOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
    discuss=discuss,
)
