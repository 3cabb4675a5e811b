"""CorDA's knowledge-preserved mode: what does a model forget while it learns something else?

A model learns word problems. Its knowledge is measured on plots of films: forgetting is
KL(original ‖ trained) of the next token on held-out plots. "kpm" is calibrated on other plots and
trains what they use least. "ipm" is calibrated on the problems and trains what they use most. Both
are compared with LoRA's usual start, and with PiSSA where its rates are given.

A learning rate that suits one start is ten times too high for another, and a start that learns less
forgets less. So every start is trained at several rates, and forgetting is compared at an equal
amount learned: the point of each training where the loss on held-out problems has fallen by that
amount, at the best rate of each start. The first seed tries every rate, the others repeat the rates
that won with it.

Source: Yang et al. 2024, "CorDA", NeurIPS 2024, arXiv 2406.05223, section 4 (tables 2 and 3).
"""

from __future__ import annotations

import altair as alt
import pandas as pd

from .application import run
from .claim import Claim
from .corda_knowledge_claims import all_claims
from .corda_knowledge_rows import CordaKnowledgeOptions, measure
from .corda_knowledge_tradeoff import ARRAYS, LABELS, at_shares, reached_by_all
from .drawing import color, plot
from .reproduction import Figure, Measurement, Reproduction, Table


def judge_all(measured: Measurement) -> list[Claim]:
    """The claims, at an equal amount learned."""
    steps = measured["steps"]
    return all_claims(steps, at_shares(steps), reached_by_all(steps))


def tabulate(measured: Measurement) -> list[Table]:
    """Forgetting at an equal amount learned, and at the end."""
    steps = measured["steps"]
    fall = reached_by_all(steps)
    equal = [found.assign(learned=share * fall) for share, found in at_shares(steps).items()]
    last = steps[steps["step"] == steps["step"].max()]
    tables = [
        Table(
            "equal",
            "Forgetting where every start has learned the same, at its best rate",
            pd.concat(equal).drop(columns=ARRAYS) if equal else pd.DataFrame(),
            {"rate": "g"},
            "learned: fall of the loss on held-out problems, nats. divergence: KL(original ‖ "
            "trained) of the next token on held-out plots, nats.",
        ),
        Table(
            "end",
            "After the last step, by learning rate",
            last.drop(columns=[*ARRAYS, "step"]),
            {"rate": "g"},
            "A training that diverged has no row.",
        ),
    ]
    return [table for table in tables if len(table.frame)]


def draw(measured: Measurement) -> list[Figure]:
    """Forgetting against learning."""
    steps = measured["steps"].drop(columns=ARRAYS)
    drawn = steps.assign(
        label=steps["method"].map(LABELS),
        run=steps["method"] + steps["rate"].map(" {:g} ".format) + steps["seed"].astype(str),
        distance=steps["divergence"] ** 0.5,
    )
    present = [name for name in LABELS.values() if name in set(drawn["label"])]
    return [
        Figure(
            "tradeoff",
            "What is forgotten for what is learned",
            "One line for each training, from the origin. Low and to the right is good.",
            plot(
                drawn,
                "line",
                alt.X("fall:Q", title="learned: fall of the loss on held-out problems, nats"),
                alt.Y("distance:Q", title="forgotten: √KL on held-out plots, √nats"),
                color=color("label", present),
                height=340,
                detail="run:N",
                order="step:Q",
            ),
        )
    ]


REPRODUCTION = Reproduction(
    name="corda_knowledge",
    title="CorDA: what a fine-tuning forgets",
    source="Yang et al. 2024, arXiv 2406.05223, section 4",
    question="At the same amount learned, does CorDA’s knowledge-preserved mode forget less than "
    "LoRA’s usual start?",
    options=CordaKnowledgeOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
    caveats=(
        "The paper trains every start at one learning rate and compares what is left of the "
        "knowledge at the end. A start that learns less forgets less, so that comparison also "
        "measures how far each start moved. Here the starts are compared where they have learned "
        "the same amount. Each has its best rate, which is chosen on the same held-out texts.",
        "KL counts every change of the predictions, also an improvement. Neither KL nor perplexity "
        "measures the recall of facts, as the paper does. A few steps show how a training begins.",
    ),
)

if __name__ == "__main__":
    run(REPRODUCTION)
