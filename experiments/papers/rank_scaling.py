"""rsLoRA: under alpha / r the gradients of an adapter fade as its rank grows.

At the start B = 0 and the rows of A (r × in) are drawn alike, so ∂L/∂B = s G Aᵀ has the norm
s √r ‖G‖ / √3 for A ~ U(±1/√in): with s = alpha / r it falls as r^(-1/2), with s = alpha / √r it
does not depend on r. After the first steps of Adam, whose size no gradient changes, ∂L/∂A = s Bᵀ G
follows the same law as long as the rows of B are alike. The paper shows gradient norms of
Llama-2-7B over its training, r = 4 … 2048: falling with the rank under alpha / r, one curve for all
ranks under alpha / √r.

Measured: the norm of the whole adapter's gradient at each step of a short fine-tuning, for every
rank and both scalings, at one alpha, one learning rate, one order of the data; exponents are fitted
to the first step and to the mean of the later ones.

Source: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv
2312.03732, theorem 3.2 and figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import altair as alt
import pandas as pd
import torch

from experiments.console import say
from experiments.errors import ConfigurationError
from experiments.papers.corpora import joined_blocks, load_texts
from experiments.papers.drawing import chart
from experiments.papers.findings import Figure, Findings, Table
from experiments.papers.fine_tuning import fine_tune
from experiments.papers.fitting import PowerLaw, fit_power_law
from experiments.papers.paper import Paper, PaperSettings
from experiments.papers.running import run
from experiments.papers.subjects import Subject, load_subject
from experiments.papers.verdicts import Claim, judge
from experiments.report.canvas import SOFT
from experiments.schedule import TrainingConfig
from lora_init import LoraConfig, get_peft_model

SCALINGS = {False: "alpha / r", True: "alpha / √r"}
EXPECTED = {False: -0.5, True: 0.0}
TOLERANCE = 0.15


@dataclass
class RankScalingSettings(PaperSettings):
    """Settings.

    Attributes:
        model: as of `subjects.load_subject`, a causal model.
        ranks: at least three, none above the smaller side of a target.
        alpha: the same for all ranks and both scalings.
        target_modules: the adapted layers, by the ends of their names.
        steps, batch_size, length: of the fine-tuning on film plots.
        learning_rate: one for all: what is compared is what a rank does to it.
    """

    model: str = "smollm2"
    ranks: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64, 128, 256, 512])
    alpha: float = 16.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "o_proj", "up_proj"])
    steps: int = 8
    batch_size: int = 4
    length: int = 64
    learning_rate: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.ranks)) < 3 or min(self.ranks) < 1:
            raise ValueError(f"ranks={self.ranks}; allowed are three or more different ranks >= 1")
        if self.steps < 2:
            raise ValueError(f"steps={self.steps}; allowed are integers >= 2")


def reproduce(settings: RankScalingSettings) -> Findings:
    """Measure, fit, and judge."""
    subject = load_subject(settings.model)
    blocks = joined_blocks(
        subject.tokenizer,
        load_texts("plots"),
        length=settings.length,
        tokens=settings.steps * settings.batch_size * settings.length,
    )
    rows = []
    for stabilized in SCALINGS:
        for rank in sorted(settings.ranks):
            say(f"  {SCALINGS[stabilized]}, r = {rank}")
            rows += measure(subject, blocks, settings, rank, stabilized)
    steps = pd.DataFrame(rows)
    fits = {stabilized: fitted(steps, stabilized) for stabilized in SCALINGS}
    return Findings(
        claims=[claim(stabilized, *fits[stabilized]) for stabilized in SCALINGS]
        + [loss_claim(steps)],
        setting={
            "model": subject.described,
            "data": f"film plots, {settings.steps} steps of {settings.batch_size} × "
            f"{settings.length} tokens",
            "adapter": f"kaiming start, alpha = {settings.alpha:g}, on "
            f"{', '.join(settings.target_modules)}; AdamW, learning rate "
            f"{settings.learning_rate:g}",
            "the paper’s": "Llama-2-7B on OpenOrca, r = 4 … 2048",
        },
        tables=[table(steps, settings)],
        figures=figures(steps),
        discussion=[
            "The exponents are those that the algebra gives, so what a trained rank adds under "
            "alpha / r is bought with a smaller step: comparing ranks at one learning rate there "
            "compares step sizes, too. A few steps say nothing about where long trainings end.",
        ],
    )


def measure(
    subject: Subject,
    blocks: torch.Tensor,
    settings: RankScalingSettings,
    rank: int,
    stabilized: bool,
) -> list[dict]:
    """Loss and gradient norm of every step, as rows."""
    config = LoraConfig(
        r=rank, lora_alpha=settings.alpha, use_rslora=stabilized,
        target_modules=settings.target_modules, task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        model = get_peft_model(subject.model, config, seed=settings.seed, cache=False)
    except ValueError as error:
        raise ConfigurationError(f"ranks={settings.ranks}: {error}") from error
    training = TrainingConfig(
        steps=settings.steps, batch_size=settings.batch_size, schedule="constant", warmup=0.0,
        learning_rate=settings.learning_rate, max_grad_norm=None,
    )  # fmt: skip
    try:
        trace = fine_tune(model, blocks, training, seed=settings.seed, device=settings.device)
    finally:
        model.unload()
    return [
        {"scaling": SCALINGS[stabilized], "rank": rank, "step": step, "loss": loss, "norm": norm}
        for step, (loss, norm) in enumerate(
            zip(trace.losses, trace.gradient_norms, strict=True), start=1
        )
    ]


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
    expected = EXPECTED[stabilized]
    near = [abs(fit.exponent - expected) <= TOLERANCE for fit in (first, later)]
    falls = [fit.high < 0 for fit in (first, later)]
    flatter = [abs(fit.exponent) < 0.25 for fit in (first, later)]
    return Claim(
        statement="Under alpha / √r the gradient’s norm does not depend on the rank"
        if stabilized
        else "Under alpha / r the gradient’s norm collapses as the rank grows",
        paper="one curve for r = 4 … 2048 (no exponent given; 0 by the algebra)"
        if stabilized
        else "falling curves for r = 4 … 2048 (no exponent given; −1/2 by the algebra)",
        ours=f"norm ∝ r^{first} at the first step, r^{later} after it",
        criterion=f"both exponents within {TOLERANCE} of {expected:g}; same direction: both "
        + ("nearer to 0 than to −1/2" if stabilized else "below 0 beyond their intervals"),
        verdict=judge(
            holds=all(near),
            direction=all(flatter) if stabilized else all(falls),
            opposite=not stabilized and all(fit.low > 0 for fit in (first, later)),
        ),
    )


def loss_claim(steps: pd.DataFrame) -> Claim:
    """What the last loss gains from the smallest rank to the largest."""
    last = steps[steps["step"] == steps["step"].max()].set_index(["scaling", "rank"])["loss"]
    gains = {}
    for name in SCALINGS.values():
        losses = last[name].sort_index()
        gains[name] = float(losses.iloc[0] - losses.iloc[-1])
    plain, stable = gains[SCALINGS[False]], gains[SCALINGS[True]]
    return Claim(
        statement="A higher rank learns more under alpha / √r, and no more under alpha / r",
        paper="perplexity falls with the rank under alpha / √r only (figure 1)",
        ours=f"last loss, smallest rank minus largest: {stable:+.3f} under alpha / √r, "
        f"{plain:+.3f} under alpha / r",
        criterion="the gain under alpha / √r is above 0.01 nats and at least three times that "
        "under alpha / r; same direction: it is larger",
        verdict=judge(
            holds=stable > 0.01 and stable >= 3 * plain,
            direction=stable > max(plain, 0.0),
            opposite=stable < 0,
        ),
        remark="One learning rate for all ranks and few steps, as in the paper’s figure: a rate "
        "tuned for every rank could close the gap.",
    )


def table(steps: pd.DataFrame, settings: RankScalingSettings) -> Table:
    rows = []
    for (scaling, rank), some in steps.groupby(["scaling", "rank"], sort=False):
        rows.append(
            {
                "scaling": scaling,
                "rank": rank,
                "s": settings.alpha / (rank if scaling == SCALINGS[False] else rank**0.5),
                "norm, first step": some["norm"].iloc[0],
                "norm, later steps": some["norm"].iloc[1:].mean(),
                "last loss": some["loss"].iloc[-1],
            }
        )
    return Table(
        "norms", "Norm of the adapter’s gradient by rank, and the loss of the last step",
        pd.DataFrame(rows), {"last loss": ".3f"},
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
            "The paper’s figure 2, on this model: under alpha / √r the lines lie together.",
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
