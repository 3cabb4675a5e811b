"""rsLoRA: under alpha / r the gradients of an adapter fade as its rank grows.

At the start B = 0 and the rows of A (r × in) are drawn alike, so ∂L/∂B = s G Aᵀ has the norm
s √r ‖G‖ / √3 for A ~ U(±1/√in): with s = alpha / r it falls as r^(-1/2), with s = alpha / √r it
does not depend on r. After the first steps of Adam, whose size no gradient changes, ∂L/∂A = s Bᵀ G
follows the same law as long as the rows of B are alike. The paper shows gradient norms of
Llama-2-7B over its training, r = 4 … 2048: falling with the rank under alpha / r, one curve for all
ranks under alpha / √r.

Measured: the norm of the whole adapter's gradient at each step of a short fine-tuning, for every
rank and both scalings, at one alpha, one learning rate, one order of the data; exponents are fitted
to the first step and to the mean of the later ones. What was learned is the loss on blocks of other
films, the same for all, so that two ranks are compared block by block.

Source: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv
2312.03732, theorem 3.2 and figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import altair as alt
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from experiments.console import say
from experiments.errors import ConfigurationError
from experiments.papers.corpus import joined_blocks, load_texts
from experiments.papers.drawing import chart
from experiments.papers.findings import Figure, Findings, Table
from experiments.papers.fine_tuning import fine_tune
from experiments.papers.fitting import PowerLaw, fit_power_law
from experiments.papers.interval import Interval, mean
from experiments.papers.reproduction import Paper, PaperSettings
from experiments.papers.language import block_losses
from experiments.papers.application import run
from experiments.papers.subject import Layer, Subject, load_subject, place
from experiments.papers.tasks import measured_layers
from experiments.papers.claim import Claim, judge
from experiments.report.canvas import SOFT
from experiments.schedule import TrainingConfig
from lora_init import LoraConfig, get_peft_model

SCALINGS = {False: "alpha / r", True: "alpha / √r"}
EXPECTED = {False: -0.5, True: 0.0}
TOLERANCE = 0.15
BETWEEN = (
    0.25  # half-way from a norm that does not depend on the rank to one that falls as r^(-1/2)
)
GAIN = 0.01  # nats a token; less is nothing learned


@dataclass
class RankScalingSettings(PaperSettings):
    """Settings.

    Attributes:
        model: as of `subjects.load_subject`, a causal model.
        ranks: at least three, none above the smaller side of a target.
        alpha: the same for all ranks and both scalings.
        target_modules: the adapted layers, by the ends of their names.
        every: of how many transformer blocks one is adapted.
        steps, batch_size, length: of the fine-tuning on film plots.
        held_out: blocks of other films, of the same length, that the loss is measured on.
        learning_rate: one for all: what is compared is what a rank does to it.
    """

    model: str = "smollm2"
    ranks: list[int] = field(default_factory=lambda: [4, 8, 32, 64, 256, 512])
    alpha: float = 16.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "o_proj", "up_proj"])
    every: int = 1
    steps: int = 8
    batch_size: int = 4
    length: int = 64
    held_out: int = 16
    learning_rate: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.ranks)) < 3 or min(self.ranks) < 1:
            raise ValueError(f"ranks={self.ranks}; allowed are three or more different ranks >= 1")
        for name, least in (("every", 1), ("steps", 2), ("held_out", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; allowed are integers >= {least}")


def reproduce(settings: RankScalingSettings) -> Findings:
    """Measure, fit, and judge."""
    subject = load_subject(settings.model)
    subject.model.to(place(settings.device))
    names = [layer.name for layer in targets(subject, settings)]
    texts = {split: load_texts("plots", split) for split in ("train", "validation")}
    blocks = joined_blocks(
        subject.tokenizer, texts["train"], length=settings.length,
        tokens=settings.steps * settings.batch_size * settings.length,
    )  # fmt: skip
    held_out = joined_blocks(
        subject.tokenizer, texts["validation"], length=settings.length,
        tokens=settings.held_out * settings.length,
    )  # fmt: skip
    before = float(block_losses(subject.model, held_out).mean())
    rows, losses = [], {}
    for stabilized in SCALINGS:
        for rank in sorted(settings.ranks):
            say(f"  {SCALINGS[stabilized]}, r = {rank}")
            found, learned = measure(subject, names, blocks, held_out, settings, rank, stabilized)
            rows += found
            losses[SCALINGS[stabilized], rank] = learned.tolist()
    steps, learned = pd.DataFrame(rows), pd.DataFrame(losses)
    fits = {stabilized: fitted(steps, stabilized) for stabilized in SCALINGS}
    return Findings(
        claims=[claim(stabilized, *fits[stabilized]) for stabilized in SCALINGS]
        + [loss_claim(learned)],
        setting={
            "model": subject.described,
            "data": f"film plots, {settings.steps} steps of {settings.batch_size} × "
            f"{settings.length} tokens; losses on {len(held_out)} × {settings.length} tokens of "
            f"other films, {before:.3f} before training",
            "adapter": f"kaiming start, alpha = {settings.alpha:g}, on "
            f"{', '.join(settings.target_modules)} ({len(names)} layers); AdamW, learning rate "
            f"{settings.learning_rate:g}",
            "the paper’s": "Llama-2-7B on OpenOrca, r = 4 … 2048",
        },
        tables=[table(steps, learned, settings)],
        figures=figures(steps),
        discussion=discussion(fits),
    )


def targets(subject: Subject, settings: RankScalingSettings) -> list[Layer]:
    """The adapted layers.

    Raises:
        ConfigurationError: there are none, or a rank is above the smaller side of one.
    """
    layers = [
        layer
        for layer in measured_layers(subject, settings.every)
        if any(f".{layer.kind}".endswith(f".{name}") for name in settings.target_modules)
    ]
    if not layers:
        raise ConfigurationError(
            f"target_modules={settings.target_modules}: no linear layer of {subject.name} ends so"
        )
    most, name = min((min(subject.weight(layer).shape), layer.name) for layer in layers)
    if max(settings.ranks) > most:
        raise ConfigurationError(
            f"ranks={settings.ranks}: rank {max(settings.ranks)} exceeds the smaller side of "
            f"{name}; allowed are ranks from 1 to {most}"
        )
    return layers


def measure(
    subject: Subject,
    names: list[str],
    blocks: Int[Tensor, "blocks length"],
    held_out: Int[Tensor, "others length"],
    settings: RankScalingSettings,
    rank: int,
    stabilized: bool,
) -> tuple[list[dict], Float[Tensor, " others"]]:
    """Loss and gradient norm of every step, as rows; and what the trained model loses on each of
    the held-out blocks.
    """
    config = LoraConfig(
        r=rank, lora_alpha=settings.alpha, use_rslora=stabilized, target_modules=names,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(subject.model, config, seed=settings.seed, cache=False)
    training = TrainingConfig(
        steps=settings.steps, batch_size=settings.batch_size, schedule="constant", warmup=0.0,
        learning_rate=settings.learning_rate, max_grad_norm=None,
    )  # fmt: skip
    try:
        trace = fine_tune(model, blocks, training, seed=settings.seed, device=settings.device)
        learned = block_losses(model, held_out)
    finally:
        model.unload()
    rows = [
        {"scaling": SCALINGS[stabilized], "rank": rank, "step": step, "loss": loss, "norm": norm}
        for step, (loss, norm) in enumerate(
            zip(trace.losses, trace.gradient_norms, strict=True), start=1
        )
    ]
    return rows, learned


def fitted(steps: pd.DataFrame, stabilized: bool) -> tuple[PowerLaw, PowerLaw]:
    """The exponents of the first step's norm, and of the mean over the later steps."""
    some = steps[steps["scaling"] == SCALINGS[stabilized]]
    first = some[some["step"] == 1].set_index("rank")["norm"]
    later = some[some["step"] > 1].groupby("rank")["norm"].mean()
    return (
        fit_power_law(first.index.tolist(), first.tolist()),
        fit_power_law(later.index.tolist(), later.tolist()),
    )


def claim(stabilized: bool, first: PowerLaw, later: PowerLaw) -> Claim:
    expected, fits = EXPECTED[stabilized], (first, later)
    near = all(abs(fit.exponent - expected) <= TOLERANCE for fit in fits)
    ours = f"norm ∝ r^{first} at the first step, r^{later} after it"
    criterion = f"both exponents within {TOLERANCE} of {expected:g}; same direction: both "
    if stabilized:
        return Claim(
            statement="Under rsLoRA’s scaling alpha / √r the norm of the adapter’s gradient does "
            "not depend on the rank",
            paper="one curve for r = 4 … 2048 (no exponent given; 0 by the algebra)",
            ours=ours,
            criterion=f"{criterion}nearer to 0 than to ±1/2; contradicts: both intervals further "
            f"than {BETWEEN} from 0",
            verdict=judge(
                holds=near,
                direction=all(abs(fit.exponent) < BETWEEN for fit in fits),
                opposite=all(fit.low > BETWEEN or fit.high < -BETWEEN for fit in fits),
            ),
        )
    return Claim(
        statement="Under LoRA’s scaling alpha / r the norm of the adapter’s gradient collapses as "
        "the rank grows",
        paper="falling curves for r = 4 … 2048 (no exponent given; −1/2 by the algebra)",
        ours=ours,
        criterion=f"{criterion}below 0 beyond their intervals; contradicts: both above 0 beyond "
        "their intervals",
        verdict=judge(
            holds=near,
            direction=all(fit.high < 0 for fit in fits),
            opposite=all(fit.low > 0 for fit in fits),
        ),
    )


def gains(learned: pd.DataFrame) -> dict[bool, list[float]]:
    """By scaling, how much less the largest rank loses than the smallest, block by block."""
    found = {}
    for stabilized, name in SCALINGS.items():
        losses = learned[name].sort_index(axis="columns")
        found[stabilized] = (losses.iloc[:, 0] - losses.iloc[:, -1]).tolist()
    return found


def loss_claim(learned: pd.DataFrame) -> Claim:
    """What the loss on other films gains from the smallest rank to the largest.

    Args:
        learned: a row a block, a column a scaling and rank.
    """
    found = gains(learned)
    plain, stable = mean(found[False]), mean(found[True])
    more = mean([b - a for a, b in zip(found[False], found[True], strict=True)])
    ranks = sorted(learned[SCALINGS[True]].columns)
    return Claim(
        statement="A higher rank learns more under alpha / √r, and no more under alpha / r",
        paper="perplexity falls with the rank under alpha / √r only (figure 1)",
        ours=f"loss on other films, r = {ranks[0]} minus r = {ranks[-1]}, mean over "
        f"{len(learned)} blocks: {signed(stable)} under alpha / √r, {signed(plain)} under "
        "alpha / r",
        criterion=f"the gain under alpha / √r is {GAIN} nats or more, above 0 beyond its interval "
        "(paired over blocks), and three times the size of that under alpha / r or more; same "
        "direction: it is above 0, and above that under alpha / r, beyond their intervals; "
        "contradicts: it is below 0, or below that under alpha / r, beyond their intervals",
        verdict=judge(
            holds=stable.value >= GAIN
            and stable.above_zero
            and abs(plain.value) <= stable.value / 3,
            direction=stable.above_zero and more.above_zero,
            opposite=stable.below_zero or more.below_zero,
        ),
        remark="One learning rate for all ranks, as in the paper’s figure, and few steps: a rate "
        "tuned for every rank could close the gap.",
    )


def signed(gain: Interval) -> str:
    return gain.show("+.4f")


def discussion(fits: dict[bool, tuple[PowerLaw, PowerLaw]]) -> list[str]:
    """What the exponents come to; the sentences depend on them."""
    plain, stable = fits[False], fits[True]
    near = all(
        abs(fit.exponent - EXPECTED[stabilized]) <= TOLERANCE
        for stabilized, both in fits.items()
        for fit in both
    )
    sentences = [
        "By the algebra the exponents are −1/2 and 0; measured are "
        f"{plain[0].exponent:.2f} and {stable[0].exponent:.2f} at the first step, "
        f"{plain[1].exponent:.2f} and {stable[1].exponent:.2f} after it"
        + (": the same." if near else f": not all within {TOLERANCE} of these.")
    ]
    if plain[1].high < 0:
        sentences.append(
            "Where the gradient fades with the rank, so does what a step does to the product: to "
            "compare ranks at one learning rate under alpha / r is to compare step sizes, too."
        )
    return [*sentences, "A few steps say nothing about where long trainings end."]


def table(steps: pd.DataFrame, learned: pd.DataFrame, settings: RankScalingSettings) -> Table:
    rows = []
    for (scaling, rank), some in steps.groupby(["scaling", "rank"], sort=False):
        rows.append(
            {
                "scaling": scaling,
                "rank": rank,
                "s": settings.alpha / (rank if scaling == SCALINGS[False] else rank**0.5),
                "norm, first step": some["norm"].iloc[0],
                "norm, later steps": some["norm"].iloc[1:].mean(),
                "loss, other films": learned[scaling, rank].mean(),
            }
        )
    return Table(
        "norms", "Norm of the adapter’s gradient by rank, and the loss after the last step",
        pd.DataFrame(rows), {"loss, other films": ".3f"},
        "The loss is the mean over held-out blocks, in nats a token.",
    )  # fmt: skip


def figures(steps: pd.DataFrame) -> list[Figure]:
    later = steps[steps["step"] > 1].groupby(["scaling", "rank"], as_index=False)["norm"].mean()
    color = alt.Color(
        "scaling:N", scale=alt.Scale(range=["#d55e00", "#0072b2"]),
        legend=alt.Legend(title=None, orient="bottom"),
    )  # fmt: skip
    by_rank = (
        chart(later)
        .mark_line(point=True)
        .encode(
            x=alt.X(
                "rank:Q",
                scale=alt.Scale(type="log", base=2),
                title="rank",
                axis=alt.Axis(values=sorted(set(later["rank"]))),
            ),
            y=alt.Y("norm:Q", scale=alt.Scale(type="log"), title="norm of the gradient"),
            color=color,
            tooltip=["scaling:N", "rank:Q", alt.Tooltip("norm:Q", format=".3g")],
        )
        .properties(height=280)
    )
    by_step = (
        chart(steps)
        .mark_line(point=True)
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1)),
            y=alt.Y("norm:Q", scale=alt.Scale(type="log"), title="norm of the gradient"),
            color=alt.Color(
                "rank:O", scale=alt.Scale(scheme="viridis"),
                legend=alt.Legend(title="rank", orient="bottom"),
            ),
            tooltip=["rank:O", "step:Q", alt.Tooltip("norm:Q", format=".3g")],
        )
        .properties(width=290, height=240)
        .facet(alt.Column("scaling:N", title=None, header=alt.Header(labelColor=SOFT)))
    )  # fmt: skip
    return [
        Figure(
            "norms", "The gradient’s norm against the rank",
            "Mean over the steps after the first; both axes logarithmic, so that a power law is a "
            "straight line.", by_rank,
        ),
        Figure(
            "steps", "The gradient’s norm as training goes on, a line a rank",
            "The paper’s figure 2, on this model: lines that lie together do not depend on the "
            "rank.",
            by_step, width=None,
        ),
    ]  # fmt: skip


PAPER = Paper(
    name="rank_scaling",
    title="rsLoRA: gradients over the rank",
    source="Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2, figures 1 and 2",
    question="Does the scaling alpha / r let gradients fade as the rank grows, and does alpha / √r "
    "keep them?",
    settings=RankScalingSettings,
    reproduce=reproduce,
)

if __name__ == "__main__":
    run(PAPER)
