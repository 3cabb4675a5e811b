"""Every initializer that both have: its seconds, and what it computed.

Each method runs in a process of its own, where ours and PEFT's take turns on fresh copies of the
model. PEFT may crash or never end (EVA's loop does where its criterion is never met): the row then
says so, and the other methods go on. Quality beside the time:

- output gap: how far the adapted model's logits are from the base model's at step 0. LoftQ
  changes the function by design;
- excess error, for the PiSSA family: how much larger ‖W - s B A‖ is than the best possible by a
  float64 SVD, on the worst layer.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

from experiments.benchmark import quality
from experiments.benchmark.contenders import ADAPT, CALIBRATED, Request, factors, our_plan, warm_up
from experiments.benchmark.isolated import brief, run_isolated
from experiments.benchmark.ratios import paired_ratio
from experiments.benchmark.rows import Row
from experiments.benchmark.settings import BenchmarkConfig
from experiments.benchmark.subjects import load_subject
from experiments.benchmark.timing import Contender, Turn, take_turns
from lora_init.modules import oriented_weight
from lora_init.progress import tracked

TITLE = "get_peft_model by initializer, calibration included"


def run(settings: BenchmarkConfig) -> list[Row]:
    cases = [
        (n, m) for n in settings.initialization.models for m in settings.initialization.methods
    ]
    return [compare(*case, settings) for case in tracked(cases, "initialization")]


def compare(name: str, method: str, settings: BenchmarkConfig) -> Row:
    """One method's row from what its process reported."""
    chosen = settings.initialization
    outcome = run_isolated(measure, settings, chosen.time_limit, name=name, method=method)
    seconds: dict[str, dict[int, float]] = defaultdict(dict)
    figures: dict[str, float] = {}
    notes = []
    contender = "ours"
    for told in outcome.reports:
        contender = told["contender"]
        if "error" in told:
            notes.append(f"{told_name(contender)} fails: {told['error']}")
        if "seconds" not in told:
            continue
        seconds[contender][told["round"]] = told["seconds"]
        figures |= {f"{key}, {contender}": value for key, value in told["figures"].items()}
    if outcome.failure:
        notes.append(f"{told_name(contender)}: {outcome.failure}")  # the last that began
    if method in chosen.exclude:
        notes.append(f"both without {chosen.exclude[method]}")
    ours, theirs = list(seconds["ours"].values()), list(seconds["peft"].values())
    pairs = min(len(ours), len(theirs))
    return Row(
        "initialization", name, method, "s",
        ours=median(ours) if ours else None,
        peft=median(theirs) if theirs else None,
        ratio=paired_ratio(theirs[:pairs], ours[:pairs]) if pairs else None,
        figures=dict(sorted(figures.items())),
        note="; ".join(notes),
    )  # fmt: skip


def told_name(contender: str) -> str:
    return {"ours": "ours", "peft": "PEFT"}[contender]


def measure(
    settings: BenchmarkConfig, report: Callable[[dict], None], name: str, method: str
) -> None:
    """In a fresh process: turns of ours and PEFT's, each reported as soon as it is over."""
    chosen = settings.initialization
    subject = load_subject(name, settings)
    request = Request(
        subject.settings.task, settings.rank, settings.alpha, settings.seed, method,
        exclude=chosen.exclude.get(method),
    )  # fmt: skip
    calibration = (
        subject.calibration_batches(chosen.sentences, chosen.batch_size)
        if method in CALIBRATED
        else None
    )

    def attempt(adapt: Callable, model: Any) -> Any:
        try:
            return adapt(model, request, calibration)
        except Exception as error:  # whatever it is, it belongs into the row
            return error

    def begin(contender: str) -> Any:
        report({"contender": contender})  # should it never end, it is known who did not
        return copy.deepcopy(subject.model)

    contenders = {
        contender: Contender(
            lambda _, contender=contender: begin(contender),
            lambda model, adapt=adapt: attempt(adapt, model),
        )
        for contender, adapt in ADAPT.items()
    }
    judge = Judge(subject.model, subject.training_batches(1)[0], request)
    for contender in list(contenders):
        with contextlib.suppress(Exception):  # what fails here fails again below, and is told
            warm_up(contender, request, (64, 64), subject.device)
    for turn in take_turns(contenders, chosen.repetitions, subject.device, method):
        told = {"contender": turn.contender, "round": turn.round}
        if isinstance(turn.result, Exception):
            del contenders[turn.contender]
            report({**told, "error": brief(turn.result)})
        else:
            figures = judge(turn) if turn.round == 0 else {}
            report({**told, "seconds": turn.seconds, "figures": figures})


class Judge:
    """Figures of an adapted model, against the base model."""

    def __init__(self, base: Any, batch: dict, request: Request) -> None:
        self.batch = batch
        self.expected = quality.logits(base, batch)
        self.weights = {
            target.name: oriented_weight(base.get_submodule(target.name)).detach()
            for target in our_plan(base, request).targets
        }
        self.optimum = (
            quality.optimal_errors(self.weights, request.rank)
            if request.method.startswith("pissa")
            else None
        )

    def __call__(self, turn: Turn) -> dict[str, float]:
        gap = quality.output_gap(quality.logits(turn.result, self.batch), self.expected)
        if self.optimum is None:
            return {"output gap": gap}
        made = factors(turn.contender, turn.result)
        excess = quality.worst_excess(self.weights, made, self.optimum)
        return {"output gap": gap, "excess error": excess}
