"""rsLoRA: the scaling alpha / r makes the gradients of an adapter fade as the rank grows.

At the start B = 0 and the rows of A (r × in) are drawn alike. ∂L/∂B = s G Aᵀ then has the norm
s √r ‖G‖ / √3 for A ~ U(±1/√in): with s = alpha / r it falls as r^(-1/2), with s = alpha / √r it
does not depend on r. The first steps of Adam do not depend on the gradient's size. After them
∂L/∂A = s Bᵀ G follows the same law as long as the rows of B are alike. The paper shows gradient
norms of Llama-2-7B during training, r = 4 … 2048.

Measured: the norm of the whole adapter's gradient at each step of a short fine-tuning, for every
rank and both scalings, at one alpha, one learning rate and one order of the data. Exponents are
fitted to the first step and to the mean of the later ones. The trained models are compared by their
losses on blocks of other films, block by block.

Source: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv
2312.03732, theorem 3.2 and figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import altair as alt
import pandas as pd

from lora_init import LoraConfig

from ..console import say
from ..errors import ConfigurationError
from .application import run
from .claim import Claim, judge
from .corpus import plot_blocks
from .drawing import BELOW, LOG, color, plot
from .fine_tuning import constant_training, fine_tune
from .interval import Interval, fit_exponent, mean
from .language import block_losses
from .reproduction import (
    Figure,
    Measurement,
    Options,
    Reproduction,
    Table,
    require,
    require_at_least,
)
from .starts import adapted
from .subject import Layer, Subject, load_subject, place
from .tasks import measured_layers

SCALINGS = {False: "alpha / r", True: "alpha / √r"}
EXPECTED = {False: -0.5, True: 0.0}
TOLERANCE = 0.15
BETWEEN = (
    0.25  # half-way from a norm that does not depend on the rank to one that falls as r^(-1/2)
)
GAIN = 0.01  # nats a token; a smaller gain does not count as learning


@dataclass
class RankScalingOptions(Options):
    """What is trained.

    Attributes:
        model: a causal model, as `load_subject` takes it.
        ranks: at least three, none above the smaller side of a target.
        alpha: the same for all ranks and both scalings.
        target_modules: the adapted layers, by the ends of their names.
        every: one of so many transformer blocks is adapted.
        steps, batch_size, length: of the fine-tuning on film plots.
        held_out: blocks of other films, of the same length, for the losses.
        learning_rate: the same for all ranks, to show what a rank does to it.
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
        enough = len(set(self.ranks)) >= 3 and min(self.ranks) >= 1
        require(self, "ranks", enough, "three or more different ranks >= 1")
        require_at_least(self, 1, "every")
        require_at_least(self, 2, "steps", "held_out")


def measure(options: RankScalingOptions) -> Measurement:
    """Train one adapter for each rank and scaling."""
    subject = load_subject(options.model)
    subject.model.to(place(options.device))
    names = [layer.name for layer in targets(subject, options)]
    count = options.steps * options.batch_size
    trained = plot_blocks(subject.tokenizer, "train", count, options.length)
    held_out = plot_blocks(subject.tokenizer, "validation", options.held_out, options.length)
    before = float(block_losses(subject.model, held_out).mean())
    training = constant_training(options, options.learning_rate)
    rows, losses = [], {}
    for stabilized, scaling in SCALINGS.items():
        for rank in sorted(options.ranks):
            say(f"  {scaling}, r = {rank}")
            config = LoraConfig(
                r=rank,
                lora_alpha=options.alpha,
                use_rslora=stabilized,
                target_modules=names,
                task_type="CAUSAL_LM",
            )
            with adapted(subject.model, config, f"r={rank}", seed=options.seed) as model:
                trace = fine_tune(
                    model, trained, training, seed=options.seed, device=options.device
                )
                losses[scaling, rank] = block_losses(model, held_out).tolist()
            rows += [
                {"scaling": scaling, "rank": rank, "step": step, "loss": loss, "norm": norm}
                for step, loss, norm in trace.steps()
            ]
    facts = {
        "model": f"{subject.described}; {len(names)} layers are adapted",
        "data": f"film plots; losses on other films, {before:.3f} before training",
        "the paper’s": "Llama-2-7B on OpenOrca, r = 4 … 2048",
    }
    frames = {"steps": pd.DataFrame(rows), "losses": pd.DataFrame(losses)}
    return Measurement(options, frames, facts)


def targets(subject: Subject, options: RankScalingOptions) -> list[Layer]:
    """The adapted layers.

    Raises:
        ConfigurationError: there are none, or a rank is above the smaller side of one.
    """
    layers = [
        layer
        for layer in measured_layers(subject, options.every)
        if any(f".{layer.kind}".endswith(f".{name}") for name in options.target_modules)
    ]
    if not layers:
        raise ConfigurationError(
            f"target_modules={options.target_modules} is not supported: must be the ends of names "
            f"of linear layers in {subject.name}."
        )
    most, name = min((min(subject.weight(layer).shape), layer.name) for layer in layers)
    if max(options.ranks) > most:
        raise ConfigurationError(
            f"ranks={options.ranks} is not supported: must be from 1 to {most}, the smaller side "
            f"of {name}."
        )
    return layers


def fit_norms(steps: pd.DataFrame, stabilized: bool) -> tuple[Interval, Interval]:
    """The exponents of the first step's norm and of the mean norm of the later steps."""
    some = steps[steps["scaling"] == SCALINGS[stabilized]]
    first = some[some["step"] == 1].set_index("rank")["norm"]
    later = some[some["step"] > 1].groupby("rank")["norm"].mean()
    return tuple(fit_exponent(norms.index.tolist(), norms.tolist()) for norms in (first, later))


def judge_all(measured: Measurement) -> list[Claim]:
    """Two claims on gradients, one on losses."""
    claims = [norm_claim(flag, *fit_norms(measured["steps"], flag)) for flag in SCALINGS]
    return [*claims, loss_claim(measured["losses"])]


def norm_claim(stabilized: bool, first: Interval, later: Interval) -> Claim:
    """The claim on the gradient under one scaling."""
    expected, fits = EXPECTED[stabilized], (first, later)
    near = all(abs(fit.value - expected) <= TOLERANCE for fit in fits)
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
                direction=all(abs(fit.value) < BETWEEN for fit in fits),
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
    """The loss of the smallest rank minus that of the largest, block by block."""
    found = {}
    for stabilized, name in SCALINGS.items():
        losses = learned[name].sort_index(axis="columns")
        found[stabilized] = (losses.iloc[:, 0] - losses.iloc[:, -1]).tolist()
    return found


def loss_claim(learned: pd.DataFrame) -> Claim:
    """The claim on losses; `learned` has a row per block, a column per scaling and rank."""
    found = gains(learned)
    plain, stable = mean(found[False]), mean(found[True])
    more = mean([b - a for a, b in zip(found[False], found[True], strict=True)])
    ranks = sorted(learned[SCALINGS[True]].columns)
    return Claim(
        statement="A higher rank learns more under alpha / √r, and no more under alpha / r",
        paper="perplexity falls with the rank under alpha / √r only (figure 1)",
        ours=f"loss on other films, r = {ranks[0]} minus r = {ranks[-1]}, mean over "
        f"{len(learned)} blocks: {stable.show('+.4f')} under alpha / √r, "
        f"{plain.show('+.4f')} under alpha / r",
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


def tabulate(measured: Measurement) -> list[Table]:
    """Norms and losses by scaling and rank."""
    rows = []
    for (scaling, rank), some in measured["steps"].groupby(["scaling", "rank"], sort=False):
        root = 1 if scaling == SCALINGS[False] else 2
        rows.append(
            {
                "scaling": scaling,
                "rank": rank,
                "s": measured.options.alpha / rank ** (1 / root),
                "norm, first step": some["norm"].iloc[0],
                "norm, later steps": some["norm"].iloc[1:].mean(),
                "loss, other films": measured["losses"][scaling, rank].mean(),
            }
        )
    table = Table(
        "norms",
        "Norm of the adapter’s gradient by rank, and the loss after the last step",
        pd.DataFrame(rows),
        {"loss, other films": ".3f"},
        "The loss is the mean over held-out blocks, in nats a token.",
    )
    return [table]


def draw(measured: Measurement) -> list[Figure]:
    """The norm over ranks and over steps."""
    steps = measured["steps"]
    later = steps[steps["step"] > 1].groupby(["scaling", "rank"], as_index=False)["norm"].mean()
    norm = alt.Y("norm:Q", scale=LOG, title="norm of the gradient")
    return [
        Figure(
            "norms",
            "The gradient’s norm against the rank",
            "Mean over the steps after the first; both axes are logarithmic.",
            plot(
                later,
                "line",
                alt.X("rank:Q", scale=alt.Scale(type="log", base=2)),
                norm,
                color=color("scaling", list(SCALINGS.values())),
            ),
        ),
        Figure(
            "steps",
            "The gradient’s norm as training goes on, by rank",
            "Lines that lie together do not depend on the rank.",
            plot(
                steps,
                "line",
                alt.X("step:Q", axis=alt.Axis(tickMinStep=1)),
                norm,
                color=alt.Color("rank:O", scale=alt.Scale(scheme="viridis"), legend=BELOW),
                panel="scaling",
            ),
            width=None,
        ),
    ]


REPRODUCTION = Reproduction(
    name="rank_scaling",
    title="rsLoRA: gradients over the rank",
    source="Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2, figures 1 and 2",
    question="Does the scaling alpha / r let gradients fade as the rank grows, and does alpha / √r "
    "keep them?",
    options=RankScalingOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
)

if __name__ == "__main__":
    run(REPRODUCTION)
