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
- peak: of ours above the model, beside what the plan and a plain forward pass allow;
- floors: how many times the least that bytes and operations need ours takes (`floors.py`).
"""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from experiments.benchmark.cases import NAMES, Case
from experiments.benchmark.commentary import Commentary
from experiments.benchmark.contest import contest
from experiments.benchmark.floors import floor
from experiments.benchmark.isolated import run_isolated
from experiments.benchmark.rates import Rates, measure_rates
from experiments.benchmark.ratios import paired_ratio
from experiments.benchmark.rows import Quality, Row, overall, verdict, verdict_below
from experiments.benchmark.settings import BenchmarkConfig
from experiments.benchmark.strategies import STRATEGIES, Demand
from experiments.benchmark.tables import NOTHING, figure
from experiments.console import say
from experiments.report.statistics import Interval

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
PAIRS = 5  # fewer give no interval
PARTS = ("with", "without", "pass")


def run(settings: BenchmarkConfig) -> list[Row]:
    rates = measure_rates(torch.device(settings.device))
    say(f"  this machine: {rates}")
    rows = []
    for name in settings.initialization.models:
        say(f"  {name}")
        rows += measure(name, settings, rates)
    return rows


def measure(name: str, settings: BenchmarkConfig, rates: Rates) -> list[Row]:
    """One model's rows. A process that breaks off costs the strategy at hand; another goes on."""
    reports: list[dict[str, Any]] = []
    begun: list[tuple[int, str]] = []
    broken: dict[tuple[int, str], str] = {}
    while True:
        commentary = Commentary()
        outcome = run_isolated(
            contest, settings, settings.initialization.process_limit, hear=commentary.hear,
            name=name, rates=asdict(rates), begun=begun,
        )  # fmt: skip
        commentary.conclude()
        reports += outcome.reports
        cases = list(dict.fromkeys((r["rank"], r["method"]) for r in reports if "method" in r))
        if outcome.failure is None:
            break
        if len(cases) == len(begun):  # it never came to a strategy
            return [Row("initialization", name, "all", "s", note=outcome.failure)]
        broken[cases[-1]] = outcome.failure
        begun = cases
    plain = next((r for r in reports if "plain" in r), None)
    rows = []
    for rank, method in cases:
        told = [r for r in reports if (r.get("rank"), r.get("method")) == (rank, method)]
        case = Case.of(told, rank, method)
        if (rank, method) in broken:
            case.notes.append(f"process: {broken[rank, method]}")
        rows += rows_of(name, case, settings, rates, plain)
    return rows


def rows_of(
    name: str,
    case: Case,
    settings: BenchmarkConfig,
    rates: Rates,
    plain: dict[str, Any] | None,
) -> list[Row]:
    """The strategy's row; for EVA also what it costs in units of the plain passes."""
    targets = settings.models[name].targets
    ours = case.median_of("ours")
    peer = "peft" if case.seconds.get("peft") else "exact"
    ratio = ratio_of(case, peer)
    demanded = STRATEGIES[case.method].demand
    quality = {
        figure: demanding(values, demanded if demanded and demanded.figure == figure else None)
        for figure, values in case.quality.items()
    }
    target = None if case.method == "eva" else targets.get(case.method)
    kept = {None: None, True: "met", False: "missed"}
    judged = [verdict(ratio, target), *(kept[figure.kept] for figure in quality.values())]
    if case.method in settings.initialization.exclude:
        case.notes.append(f"both without {settings.initialization.exclude[case.method]}")
    case.notes += [f"{figure} missed" for figure, q in quality.items() if q.kept is False]
    row = Row(
        "initialization", titled(name, settings, case.rank), case.method, "s",
        ours=ours, peft=case.median_of("peft"), exact=case.median_of("exact"),
        ratio=ratio, peer=NAMES[peer], target=target, verdict=overall(judged),
        quality=quality, figures=figures_of(case, rates), note="; ".join(case.notes),
    )  # fmt: skip
    if case.method != "eva" or plain is None or not case.seconds.get("ours"):
        return [row]
    return [row, beyond_the_pass(row, case, plain, targets.get("eva"))]


def ratio_of(case: Case, peer: str) -> Interval | None:
    """The peer's time over ours: by pairs where there are five, else of the medians.

    None where one gave no time, or ours is not above the call without the method.
    """
    ours, theirs = case.seconds.get("ours", {}), case.seconds.get(peer, {})
    rounds = sorted(ours.keys() & theirs.keys())
    if len(rounds) >= PAIRS and all(ours[number] > 0 for number in rounds):
        return paired_ratio([theirs[n] for n in rounds], [ours[n] for n in rounds])
    if not ours or not theirs or median(ours.values()) <= 0:
        return None
    ratio = median(theirs.values()) / median(ours.values())
    return Interval(ratio, ratio, ratio)


def demanding(values: dict[str, float], demand: Demand | None) -> Quality:
    """A figure of quality with its demand: a limit, or PEFT's own figure."""
    ours, theirs = values.get("ours"), values.get("peft")
    if demand is None:
        return Quality(ours, theirs)
    limit = theirs if demand.limit is None else demand.limit
    return Quality(ours, theirs, limit, demand.least)


def figures_of(case: Case, rates: Rates) -> dict[str, float | None]:
    """Everything behind the row's times, for `result.json` and the columns of the table."""
    least = floor(case.method, case.shapes, case.rank, rates) if case.shapes else None
    ours = case.median_of("ours")
    figures = {
        "our pass, s": case.calibrated or None,
        "floor, s": least,
        "floors": ours / least if ours is not None and least else None,
        "peak, MiB": case.peak,
        "allowed, MiB": case.allowed,
    }
    for contender in ("ours", "peft"):
        name = NAMES[contender]
        for part, table in zip(PARTS, (case.whole, case.without, case.passes), strict=True):
            seconds = table[contender].values()
            figures[f"{name} {part}, s"] = median(seconds) if seconds else None
        figures[f"{name} gap"] = case.gaps.get(contender)
    for contender in ("ours", "peft", "exact"):
        seconds = case.seconds.get(contender, {}).values()
        figures[f"{NAMES[contender]} least, s"] = min(seconds) if seconds else None
        figures[f"{NAMES[contender]} turns"] = float(len(seconds))
    return figures


def beyond_the_pass(row: Row, case: Case, plain: dict[str, Any], ceiling: float | None) -> Row:
    """EVA's time beyond its pass, in units of the plain forward passes over 16,384 tokens."""
    unit = sum(plain["plain"]) * TOKENS / plain["tokens"]
    shares = [seconds / unit for seconds in case.seconds["ours"].values()]
    share = Interval(median(shares), min(shares), max(shares))
    note = f"plain passes over {TOKENS:,} tokens take {unit:.2f} s"
    if plain["tokens"] != TOKENS:
        note += f", by those over {plain['tokens']:,}"
    return Row(
        "initialization", row.model, "eva / plain passes", "×", ours=share.estimate,
        ceiling=ceiling, verdict=verdict_below(share, ceiling), note=note,
    )  # fmt: skip


TOKENS = 16_384  # of the plain passes that EVA is measured against


def titled(name: str, settings: BenchmarkConfig, rank: int) -> str:
    """A model as its rows are headed: what is synthetic says so."""
    chosen = settings.models[name]
    synthetic = " (synthetic)" if chosen.layer is not None or chosen.llama is not None else ""
    return f"{name}{synthetic}, r {rank}"


def pair(row: Row, ours: str, other: str) -> str:
    """Two figures in one cell, the second in brackets."""
    first, second = (figure(name, row.figures.get(name)) for name in (ours, other))
    return first if second == NOTHING else f"{first} ({second})"


def parts(row: Row, name: str) -> str:
    """The call, less the call without the method, less the pass over data."""
    taken = [figure("s, s", row.figures.get(f"{name} {part}, s")) for part in PARTS]
    return " − ".join(text for text in taken if text != NOTHING)
