"""Perplexity as more and more of the least components are dropped from every layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_init import LoraConfig, calibrate
from lora_init.progress import tracked

from ..console import say
from .corda_compression_projections import Inputs, least_components
from .corpus import joined_blocks, language_batches, load_texts
from .language import block_losses, paired_error, perplexity, spread
from .reproduction import Measurement, Options, require
from .subject import Subject, load_subject, place, restored

OWN, FOREIGN = "plots", "problems"
COMPARED = 0.25
"""The dropped share at which claims are judged."""


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
        compared = f"a list with {COMPARED:g}, where the paper’s figures are compared"
        require(self, "fractions", COMPARED in self.fractions, compared)
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
        "model": f"{subject.described}; {len(names)} linear layers",
        "data": f"test: {test.numel()} tokens of held-out film plots (whole model: perplexity "
        f"{full:.2f}); calibration: other films’ plots, or word problems",
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
            say(f"  {method}")
            losses = losses_by_fraction(
                subject.model, names, method, inputs, fractions, test, **shared
            )
            yield method, corpus, tokens, losses


@torch.no_grad()
def losses_by_fraction(
    model: nn.Module,
    names: Sequence[str],
    method: str,
    inputs: Mapping[str, Inputs] | None,
    fractions: Sequence[float],
    blocks: Int[Tensor, "blocks length"],
    *,
    alpha: float,
    batch_size: int,
) -> dict[float, Float[Tensor, " blocks"]]:
    """The blocks' losses for each fraction of components dropped; the model is left as it was.

    Each layer is decomposed once: a larger fraction drops what a smaller one drops, and more.
    """
    ascending = sorted(fractions)
    found = {}
    weights = {name: model.get_submodule(name).weight for name in names}
    with restored(weights):
        components = {
            name: least_components(
                weight.detach(),
                method,
                None if inputs is None else inputs[name],
                dropped(weight.shape, ascending[-1]),
                alpha,
            )
            for name, weight in tracked(list(weights.items()), f"decomposing ({method})")
        }
        before = 0.0
        for fraction in tracked(ascending, f"perplexity ({method})"):
            for name, least in components.items():
                weight = weights[name]
                first, last = dropped(weight.shape, before), dropped(weight.shape, fraction)
                weight.sub_(least.product(first, last))
            found[fraction] = block_losses(model, blocks, batch_size)
            before = fraction
    return found


def dropped(shape: Sequence[int], fraction: float) -> int:
    """How many of the min(out, in) components a fraction is; a positive one drops at least one."""
    return max(round(fraction * min(shape)), int(fraction > 0))


def observe_inputs(
    model: nn.Module, names: Sequence[str], blocks: Int[Tensor, "blocks length"], batch_size: int
) -> dict[str, Inputs]:
    """The inputs of the layers `names`, by name, over all tokens of `blocks`."""
    config = LoraConfig(
        r=1, target_modules=list(names), task_type="CAUSAL_LM",
        # Of CorDA's modes the one that reads small directions: its sums are in float64.
        init_lora_weights="corda", corda_config={"corda_method": "kpm"},
    )  # fmt: skip
    with magnitudes(model, names) as found:
        calibration = calibrate(model, config, language_batches(blocks, batch_size))
    # Layers that read the same inputs share one object, and then one second moment.
    distinct = {id(layer.inputs): layer.inputs for layer in calibration.layers.values()}
    moments = {key: inputs.second_moment for key, inputs in distinct.items()}
    return {
        name: Inputs(moments[id(layer.inputs)], found[name] / blocks.numel())
        for name, layer in calibration.layers.items()
    }


@contextmanager
def magnitudes(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Float[Tensor, " in"]]]:
    """Sums of |x| over the tokens that pass while the context is open, by layer."""
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        total = inputs.detach().flatten(0, -2).abs().sum(0, dtype=torch.float64)
        sums[name] = sums[name] + total if name in sums else total

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: add(name, args[0])
        )
        for name in names
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
