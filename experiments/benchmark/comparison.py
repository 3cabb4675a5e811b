"""From what was told of a strategy to its row: times, ratio, quality, and the verdict on them."""

from __future__ import annotations

from statistics import median
from typing import Any

from experiments.benchmark.cases import NAMES, Case
from experiments.benchmark.floors import floor
from experiments.benchmark.rates import Rates
from experiments.benchmark.ratios import paired_ratio
from experiments.benchmark.rows import Quality, Row, overall, verdict, verdict_below
from experiments.benchmark.settings import BenchmarkConfig
from experiments.benchmark.strategies import STRATEGIES, Demand
from experiments.report.statistics import Interval

PAIRS = 5  # fewer give no interval
PARTS = ("with", "without", "pass")
TOKENS = 16_384  # of the plain passes that EVA is measured against


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
    # Without a peer's time a wanted ratio is neither reached nor missed.
    speed = "open" if target is not None and ratio is None else verdict(ratio, target)
    judged = [speed, *(kept[figure.kept] for figure in quality.values())]
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


def titled(name: str, settings: BenchmarkConfig, rank: int) -> str:
    """A model as its rows are headed: what is synthetic says so."""
    chosen = settings.models[name]
    synthetic = " (synthetic)" if chosen.layer is not None or chosen.llama is not None else ""
    return f"{name}{synthetic}, r {rank}"
