"""SC-LoRA: what a fine-tuning keeps, compared at the same size of the update.

SC-LoRA moves the adapter away from the outputs that data to keep use. A start that moves the
weights less also keeps more. So the change of what is to be kept is measured twice: at the end of
each training, and for c ΔW of the same Frobenius norm for every arm, where only the direction of ΔW
differs.

The classifier learns film reviews. Film plots are to be kept: the change is 1 minus the cosine of
each plot's mean representation before and after.

Source: Luo et al. 2025, "SC-LoRA", arXiv 2505.23724.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import altair as alt
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lora_init import LoraModel
from lora_init.progress import tracked

from .application import run
from .claim import Claim
from .classifier_training import Arm, Classifier, TrainingOptions
from .corpus import load_texts, sentence_batches
from .drawing import plot
from .interval import Interval, mean
from .paired_comparison import SEARCHED, differences, resolved, rows_of
from .reproduction import Figure, Measurement, Reproduction, Table, require
from .subject import moved

BASELINE = "kaiming"
MEASURES = {"change": "at the end", "matched": "at the same ‖ΔW‖"}
Batches = list[dict[str, Tensor]]
Updates = Mapping[str, Float[Tensor, "out in"]]


@dataclass
class RetentionOptions(TrainingOptions):
    """The options of trainings, and what is kept.

    Attributes:
        betas: the weights of the data to keep in SC-LoRA; 0 ignores them.
        kept: held-out plots whose representations are compared.
        size: the Frobenius norm of all updates together, relative to that of the weights, at which
            arms are compared.
    """

    betas: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.8, 0.9])
    kept: int = 64
    size: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        ascending = len(self.betas) > 1 and sorted(set(self.betas)) == self.betas
        fits = ascending and self.betas[0] >= 0 and self.betas[-1] <= 1
        require(self, "betas", fits, "two or more ascending numbers from 0 to 1")
        require(self, "kept", self.kept >= 2, "an integer >= 2")
        require(self, "size", self.size > 0, "a number > 0")


def arm_name(beta: float) -> str:
    return f"sc_lora, beta {beta:g}"


class Kept:
    """Held-out texts, and their representations in the original model."""

    def __init__(self, classifier: Classifier, options: RetentionOptions) -> None:
        self.classifier = classifier
        self.batches = plots(classifier, "test", options.kept)
        self.before = self.representations(classifier.subject.model)

    @torch.no_grad()
    def representations(self, model: torch.nn.Module) -> Float[Tensor, "texts width"]:
        """The mean of the last hidden states over each text's tokens; float64."""
        model.eval()
        found = []
        for batch in self.batches:
            states = model.base_model(**batch).last_hidden_state.double()
            found.append((states * batch["attention_mask"][..., None]).sum(1))
        return torch.cat(found)

    def change(self) -> float:
        """1 minus the mean cosine of the representations before and now."""
        after = self.representations(self.classifier.subject.model)
        return float((1 - F.cosine_similarity(self.before, after, dim=-1)).mean())


def plots(classifier: Classifier, split: str, count: int) -> Batches:
    """Film plots in batches without labels."""
    options = classifier.options
    texts = load_texts("plots", split, count)
    batches = sentence_batches(
        classifier.subject.tokenizer, texts, length=options.length, size=options.batch_size
    )
    return [{key: value.to(classifier.device) for key, value in batch.items()} for batch in batches]


def norm(matrices: Updates) -> float:
    """The Frobenius norm of all matrices together."""
    return float(sum(one.double().square().sum() for one in matrices.values()).sqrt())


def measure(options: RetentionOptions) -> Measurement:
    """Train every arm, and move the original weights along its update."""
    classifier = Classifier(options)
    kept = Kept(classifier, options)
    sets = {
        "learn": classifier.learn,
        "keep": plots(classifier, "train", options.calibration_batches * options.batch_size),
    }
    arms = {BASELINE: Arm("kaiming")}
    arms |= {arm_name(beta): Arm({"name": "sc_lora", "beta": beta}) for beta in options.betas}
    calibration = classifier.calibrated(list(arms.values()), sets)
    rows: list[dict[str, Any]] = []
    for name in tracked(list(arms), "trainings"):
        found = partial(
            classifier.scored,
            arms[name],
            calibration,
            measure=partial(retained, kept=kept, options=options),
        )
        rows += rows_of(options, name, found)
    facts = {
        "model": f"{classifier.subject.described}; the head is trained alone, then frozen",
        "data": "film reviews are learned, film plots are kept",
        "adapter": "query and value, s = 1; same size: ‖ΔW‖ = size ‖W‖, all layers together",
        "rates": SEARCHED,
        "the paper’s": "Llama-2-7B, r = 128; TriviaQA and safety after fine-tuning",
    }
    return Measurement(options, {"trainings": pd.DataFrame(rows)}, facts)


def retained(model: LoraModel, kept: Kept, options: RetentionOptions) -> dict[str, float]:
    """The scores of a trained model, and the change of what is kept, at both sizes."""
    layers = model.layers
    found = kept.classifier.scores(model)
    with torch.no_grad():
        updates = {name: layer.delta_weight() for name, layer in layers.items()}
        originals = {name: layer.original_weight() for name, layer in layers.items()}
    found["change"] = kept.change()
    found["size"] = norm(updates) / norm(originals)
    with model.disable_adapter(), torch.no_grad():
        weights = {name: layer.base_layer.weight for name, layer in layers.items()}
        with moved(weights, updates, options.size / found["size"]):
            found["matched"] = kept.change()
    return found


def judge_all(measured: Measurement) -> list[Claim]:
    """Does SC-LoRA keep more, and does this remain at the same size?"""
    strongest = arm_name(measured.options.betas[-1])
    weakest = arm_name(measured.options.betas[0])
    return [
        keeps_more(
            measured,
            strongest,
            BASELINE,
            "change",
            "SC-LoRA keeps more than LoRA",
            "TriviaQA after MetaMath 50.52 (LoRA 46.81); Llama-2-7B, r = 128",
            published=True,
        ),
        keeps_more(
            measured,
            strongest,
            BASELINE,
            "matched",
            "SC-LoRA keeps more than LoRA at the same size of the update",
            "– (a third party finds no gain at the same size)",
        ),
        keeps_more(
            measured,
            strongest,
            weakest,
            "matched",
            f"Data to keep help: beta {measured.options.betas[-1]:g} keeps more than beta "
            f"{measured.options.betas[0]:g} at the same size of the update",
            "– (the balance is described without this control)",
        ),
    ]


def keeps_more(
    measured: Measurement,
    arm: str,
    other: str,
    measure: str,
    statement: str,
    paper: str,
    published: bool = False,
) -> Claim:
    """The paired differences of a change, relative to that of `other`."""
    rows = measured["trainings"]
    gap = differences(rows, arm, other, measure)
    scale = average(rows, other, measure).value
    relative = Interval(gap.value / scale, gap.low / scale, gap.high / scale)
    loss = differences(rows, arm, other)
    size = average(rows, arm, "size").value / average(rows, other, "size").value
    return Claim(
        statement=statement,
        paper=paper,
        ours=f"change of {other} {scale:.3g}; {arm} has {relative.show('+.1%')} less "
        f"{MEASURES[measure]}; its loss is {-loss.value:+.4f} nats higher, its ‖ΔW‖ is {size:.2g} "
        "times as large",
        criterion="the change is smaller beyond the 95 % interval over seeds; contradicts: larger "
        "beyond it; else not resolved",
        verdict=resolved(gap),
        published=published,
    )


def average(rows: pd.DataFrame, arm: str, measure: str) -> Interval:
    """The mean of a measure over the compared seeds."""
    return mean(rows[(rows["arm"] == arm) & rows["compared"].astype(bool)][measure].to_numpy())


def tabulate(measured: Measurement) -> list[Table]:
    """All figures of every arm at its best rate."""
    rows = measured["trainings"]
    compared = rows[rows["compared"].astype(bool)]
    names = ["rate", "loss", "accuracy", "size", "change", "matched"]
    frame = compared.groupby("arm", sort=False)[names].mean().reset_index()
    words = {"arm": "start", "size": "‖ΔW‖ / ‖W‖"}
    words |= {name: f"change {text}" for name, text in MEASURES.items()}
    return [
        Table(
            "retention",
            "What is learned and what changes, means over seeds",
            frame.rename(columns=words),
            {"rate": "g", "loss": ".4f", "accuracy": ".1%"},
            "Change: 1 minus the mean cosine of the representations of film plots.",
        )
    ]


def draw(measured: Measurement) -> list[Figure]:
    """The change of both kinds, by arm."""
    rows = measured["trainings"]
    compared = rows[rows["compared"].astype(bool)]
    cells = compared.melt(["arm", "seed"], list(MEASURES), "measured", "value")
    cells["measured"] = cells["measured"].map(MEASURES)
    return [
        Figure(
            "change",
            "How much the representations of film plots change",
            "A mark for each seed: at the end of each training, and with the update scaled to one "
            "size.",
            plot(
                cells,
                "tick",
                alt.X("value:Q", title="1 − cosine of plots before and after"),
                alt.Y("arm:N", sort=None, title=None),
                panel="measured",
                shared=False,
                columns=1,
                height=alt.Step(24),
            ),
            width=None,
        )
    ]


REPRODUCTION = Reproduction(
    name="sc_lora_retention",
    title="SC-LoRA: retention at the same size of the update",
    source="Luo et al. 2025, arXiv 2505.23724",
    question="Does SC-LoRA keep more because of its directions, or because it moves less?",
    options=RetentionOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
    caveats=(
        "Representations of an encoder stand for knowledge here; the paper asks a language model "
        "questions.",
    ),
)

if __name__ == "__main__":
    run(REPRODUCTION)
