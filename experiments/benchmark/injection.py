"""`get_peft_model` under kaiming, which computes next to nothing: what is left is the injection.

A fresh copy of the model each time, outside the clock. Ours is split into its stages by what it
reports itself: choosing and checking the targets (and wrapping the result up) is what remains
between the whole call and the stages that `init_report` lists.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from statistics import median

from experiments.benchmark.clock import Clock
from experiments.benchmark.contenders import ADAPT, Request
from experiments.benchmark.ratios import paired_ratio
from experiments.benchmark.rows import Hear, Row, ignore, verdict
from experiments.benchmark.settings import BenchmarkConfig
from experiments.benchmark.subjects import load_subject
from experiments.benchmark.timing import Contender, take_turns

TITLE = "get_peft_model without the work of an initializer (kaiming)"
TARGET = 1.0  # ours takes at most PEFT's time


def run(settings: BenchmarkConfig, hear: Hear = ignore, clock: Clock | None = None) -> list[Row]:
    rows = []
    for name in settings.injection.models:
        rows.append(measure(name, settings))
        hear(rows[-1])
    return rows


def measure(name: str, settings: BenchmarkConfig) -> Row:
    subject = load_subject(name, settings)
    request = Request(subject.task, settings.rank, settings.alpha, settings.seed)
    contenders = {
        contender: Contender(
            lambda _: copy.deepcopy(subject.model),
            lambda model, adapt=adapt: adapt(model, request),
        )
        for contender, adapt in ADAPT.items()
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    stages: dict[str, list[float]] = defaultdict(list)
    # The first round imports, compiles and fills caches: it is not counted.
    rounds = settings.injection.repetitions + 1
    for turn in take_turns(contenders, rounds, subject.device, f"injection into {name}"):
        if turn.round == 0:
            continue
        seconds[turn.contender].append(turn.seconds)
        if turn.contender == "ours":
            for stage, spent in split(turn.seconds, turn.result.init_report().seconds).items():
                stages[stage].append(spent)
    ratio = paired_ratio(seconds["peft"], seconds["ours"])
    return Row(
        "injection", name, "kaiming", "s",
        ours=median(seconds["ours"]), peft=median(seconds["peft"]), ratio=ratio, target=TARGET,
        verdict=verdict(ratio, TARGET),
        figures={f"our {stage}, s": median(spent) for stage, spent in stages.items()},
    )  # fmt: skip


def split(whole: float, reported: dict[str, float]) -> dict[str, float]:
    """The whole call as plan (and the rest), initialize, inject."""
    known = {stage: reported[stage] for stage in ("initialize", "inject")}
    return {"plan": whole - sum(known.values()), **known}
