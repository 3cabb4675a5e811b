"""Every strategy on every model: what ours, PEFT and torch.linalg take, and what came out of it.

The time of an initialization is `get_peft_model` less the same call with `init_lora_weights=False`,
paired within a round, less the pass over calibration data, on both sides: `contest.py` measures all
of it, a process for a model. Our pass is made before, once, by `lora_init.calibrate`. Where factors
are only drawn (kaiming, gaussian, orthogonal) the difference is noise, and the whole calls are
compared. The peer is PEFT, or the straightforward torch.linalg computation where PEFT gives no
figure.

- quality: `judging.py` has the definitions; the worst of the judged layers (`references.py`), and
  what is demanded of it;
- gap: how far the adapted model's logits are from the base model's at step 0. LoftQ changes the
  function by design;
- peak: of ours above the model, over the judged layers, beside what the plan and a plain forward
  pass allow for them;
- floors: how many times the least that bytes and operations need ours takes (`floors.py`).
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from experiments.benchmark.cases import NAMES
from experiments.benchmark.clock import Clock
from experiments.benchmark.commentary import Commentary
from experiments.benchmark.comparison import PARTS
from experiments.benchmark.contest import contest
from experiments.benchmark.isolated import run_isolated
from experiments.benchmark.rates import Rates, measure_rates
from experiments.benchmark.rows import Hear, Row, ignore
from experiments.benchmark.settings import BenchmarkConfig
from experiments.benchmark.tables import NOTHING, figure
from experiments.console import say

TITLE = (
    "get_peft_model less the same call with init_lora_weights=False, calibration passes counted "
    "apart; for kaiming, gaussian and orthogonal the whole call"
)
EXTRA = {
    "gap at step 0, ours (PEFT)": lambda row: pair(row, "ours gap", "PEFT gap"),
    "floors": lambda row: figure("floors", row.figures.get("floors")),
    "peak (allowed)": lambda row: pair(row, "peak, MiB", "allowed, MiB"),
    "call − without − pass": lambda row: parts(row, "ours"),
    "the same, PEFT": lambda row: parts(row, "PEFT"),
    "our pass": lambda row: figure("s, s", row.figures.get("our pass, s")),
    "turns": lambda row: " / ".join(
        figure("", row.figures[key])
        for name in NAMES.values()
        if (key := f"{name} turns") in row.figures
    ),
}  # fmt: skip
"""The section's columns; all figures are in `result.json`."""


def run(
    settings: BenchmarkConfig,
    hear: Hear = ignore,
    clock: Clock | None = None,
) -> list[Row]:
    rates = measure_rates(torch.device(settings.device))
    say(f"  this machine: {rates}")
    clock, rows = clock or Clock(), []
    names = settings.initialization.models
    for place, name in enumerate(names):
        say(f"  {name}")
        shares = [settings.models[other].share for other in names[place:]]
        rows += measure(name, settings, rates, hear, clock.part(shares[0] / sum(shares)))
    return rows


def measure(
    name: str,
    settings: BenchmarkConfig,
    rates: Rates,
    hear: Hear = ignore,
    clock: Clock | None = None,
) -> list[Row]:
    """One model's rows. A process that breaks off costs the strategy at hand; another goes on."""
    clock = clock or Clock()
    with Commentary(name, settings, rates, hear, clock) as commentary:
        while True:
            begun = list(commentary.begun)
            outcome = run_isolated(
                contest, settings, settings.initialization.process_limit, hear=commentary.hear,
                name=name, rates=asdict(rates), begun=begun, ends=clock.ends,
            )  # fmt: skip
            commentary.conclude(outcome.failure)
            if outcome.failure is None:
                return commentary.rows
            if len(commentary.begun) == len(begun):  # it never came to a strategy
                row = Row("initialization", name, "all", "s", note=outcome.failure)
                hear(row)
                return [*commentary.rows, row]


def pair(row: Row, ours: str, other: str) -> str:
    """Two figures in one cell, the second in brackets."""
    first, second = (figure(name, row.figures.get(name)) for name in (ours, other))
    return first if second == NOTHING else f"{first} ({second})"


def parts(row: Row, name: str) -> str:
    """The call, less the call without the method, less the pass over data."""
    taken = [figure("s, s", row.figures.get(f"{name} {part}, s")) for part in PARTS]
    return " − ".join(text for text in taken if text != NOTHING)
