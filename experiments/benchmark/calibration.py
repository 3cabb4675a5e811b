"""What collecting second moments costs, in units of the plain forward passes over the same batches.

`lora_init.calibration.collect.collect` runs over all linear layers, and over query and value
projections
alone. Plain passes go on a second copy of the model, between the observed ones, batch by batch:
each batch is a pair, and what slows the machine down for a moment slows both. What `collect` does
before the first batch and after the last is spread over the batches of a whole calibration, of
which no more are measured than the budget allows.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch

import lora_init
from experiments.benchmark.clock import Clock
from experiments.benchmark.contenders import Stopwatch
from experiments.benchmark.isolated import run_isolated
from experiments.benchmark.ratios import paired_ratio
from experiments.benchmark.rows import Hear, Row, ignore, verdict_below
from experiments.benchmark.settings import CALIBRATIONS, BenchmarkConfig, CalibrationSettings
from experiments.benchmark.subjects import Batch, Subject, load_subject
from experiments.benchmark.ticker import Ticker
from experiments.benchmark.timing import synchronize
from lora_init.calibration.collect import collect

TITLE = "the pass that collects second moments, against plain forward passes"
Q_AND_V = r".*(query|value|q_proj|v_proj)"
LABELS = {"all_linear": "all linear layers", "q_and_v": "q and v"}


def run(settings: BenchmarkConfig, hear: Hear = ignore, clock: Clock | None = None) -> list[Row]:
    clock, rows = clock or Clock(), []
    for name in settings.calibration.models:
        with Ticker(f"calibration of {name}", clock, len(CALIBRATIONS)) as ticker:
            rows += compare(name, settings, hear, ticker)
    return rows


def compare(name: str, settings: BenchmarkConfig, hear: Hear, ticker: Ticker) -> list[Row]:
    rows = []

    def conclude(told: dict[str, Any]) -> None:
        rows.append(row_of(name, told, settings))
        hear(rows[-1])
        ticker.advance()

    limit = settings.initialization.process_limit
    outcome = run_isolated(measure, settings, limit, hear=conclude, name=name)
    if outcome.failure:  # the cases that it did not come to
        for case in CALIBRATIONS[len(rows) :]:
            rows.append(Row("calibration", name, LABELS[case], "×", note=outcome.failure))
            hear(rows[-1])
    return rows


def row_of(name: str, told: dict[str, Any], settings: BenchmarkConfig) -> Row:
    ratio = paired_ratio(told["observed"], told["plain"])
    ceiling = settings.models[name].targets.get(told["case"])
    return Row(
        "calibration", name, LABELS[told["case"]], "×", ours=ratio.estimate,
        ceiling=ceiling, verdict=verdict_below(ratio, ceiling),
        figures={
            "low": ratio.low,
            "high": ratio.high,
            "plain passes, s": told["batches"] * median(told["plain"]),
            "observed passes, s": told["batches"] * median(told["observed"]),
            "layers": float(told["layers"]),
            "tokens": float(told["tokens"]),
            "pairs": float(len(told["plain"])),
        },
    )  # fmt: skip


def measure(settings: BenchmarkConfig, report: Callable[[dict], None], name: str) -> None:
    """In a fresh process: every case on the same batches, until the budget is used up."""
    subject = load_subject(name, settings)
    plain = copy.deepcopy(subject.model).eval()
    batches = subject.calibration_batches(settings.calibration.batches)
    forward(plain, batches[0])
    for case in CALIBRATIONS:
        plan = lora_init.get_peft_model(subject.model, configuration(case, subject), dry_run=True)
        names = [target.name for target in plan.targets]
        observe = partial(collect, subject.model, names, plan.calibration)
        small = [{key: value[:1] for key, value in batches[0].items()}]
        observe(small)  # loads code and work buffers
        pace = Pace(batches, partial(forward, plain), subject.device, settings.calibration)
        found = pace.over(observe)
        report(
            {
                "case": case,
                "plain": pace.plain,
                "observed": pace.observed,
                "batches": len(batches),
                "layers": len(names),
                "tokens": found.tokens // len(pace.plain) * len(batches),
            }
        )


@torch.no_grad()
def forward(model: torch.nn.Module, batch: Batch) -> None:
    model(**batch)


def configuration(case: str, subject: Subject) -> lora_init.LoraConfig:
    """Any method that asks for second moments; only its plan is used."""
    targets = Q_AND_V if case == "q_and_v" else "all-linear"
    return lora_init.LoraConfig(
        r=1, target_modules=targets, init_lora_weights="corda", task_type=subject.task
    )


@dataclass
class Pace:
    """An iterable of batches that times what its consumer does with each, and a plain pass between.

    It ends after the last batch, or earlier when the budget is used up.

    Attributes:
        plain, observed: seconds by batch that was measured; `over` adds to the latter what the
            consumer's beginning and end are to each of all batches.
    """

    batches: Sequence[Batch]
    pass_plainly: Callable[[Batch], None]
    device: torch.device
    limits: CalibrationSettings
    plain: list[float] = field(default_factory=list)
    observed: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.plain) + sum(self.observed)

    def over(self, consume: Callable[[Iterator[Batch]], Any]) -> Any:
        """Have `consume` go through the batches, everything in it timed; returns what it does."""
        watch = Stopwatch()
        result = watch(lambda: consume(iter(self)), self.device)
        rest = (watch.seconds - self.total) / len(self.batches)
        self.observed = [seconds + rest for seconds in self.observed]
        return result

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.batches):
            if number >= self.limits.least and self.total > self.limits.budget:
                return
            watch = Stopwatch()
            watch(lambda batch=batch: self.pass_plainly(batch), self.device)
            self.plain.append(watch.seconds)
            start = time.perf_counter()
            yield batch
            synchronize(self.device)
            self.observed.append(time.perf_counter() - start)
