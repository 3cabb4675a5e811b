"""All strategies on one model, in a process of its own: turns of ours, PEFT's and torch.linalg's.

A turn of ours and of PEFT's is the whole call, on a fresh copy of the model. The same call with
`init_lora_weights=False` takes turns beside it; a round's difference is the initialization.
torch.linalg's computation stands alone. A contender leaves when its budget is used up, after one
turn at least; one that fails or finds no end leaves with its reason, and the others go on. A full
decomposition is not timed twice: its time is remembered for the strategies, and the ranks, that
need the same one. Where the model's share of the benchmark's seconds runs out, everyone has one
turn only, and a peer that would take longer than is left has none (`clock.py`).
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.benchmark import quality
from experiments.benchmark.cases import BARE, NAMES
from experiments.benchmark.clock import Allowance, Clock
from experiments.benchmark.contenders import Request, Stopwatch, adapt_ours, warm_up
from experiments.benchmark.entrants import Entrants, Report
from experiments.benchmark.floors import floor
from experiments.benchmark.isolated import brief
from experiments.benchmark.judging import judge
from experiments.benchmark.limits import OutOfTime
from experiments.benchmark.needs import needs
from experiments.benchmark.peaks import (
    MIB,
    GpuPeak,
    HostPeak,
    handing_back,
    peak_watch,
    release_to_system,
)
from experiments.benchmark.provisions import Provisions
from experiments.benchmark.rates import Rates
from experiments.benchmark.settings import BenchmarkConfig
from experiments.benchmark.strategies import STRATEGIES
from experiments.benchmark.subjects import Subject, load_subject
from experiments.benchmark.timing import Contender, Turn, take_turns
from lora_init.plan.plan import Plan

DEAR_FLOOR = 0.05  # seconds; what ours takes is two to sixty times its floor
OVER = "not begun: the model's share of `seconds` is used up"


def contest(
    settings: BenchmarkConfig,
    report: Report,
    name: str,
    rates: Mapping[str, float],
    begun: Sequence[Sequence[Any]],
    ends: float | None = None,
) -> None:
    """Measure every (rank, method) of the model `name` that an earlier process did not begin.

    Args:
        ends: on the monotonic clock, when the model's share of the benchmark's seconds is over.
    """
    arena = Arena(load_subject(name, settings), settings, Rates(**rates))
    cases = [(rank, method) for rank in settings.models[name].ranks for method in arena.methods]
    report({"strategies": len(cases)})
    report(arena.plain_passes())
    cases = [case for case in cases if list(case) not in begun]
    expected = arena.needs([arena.request(rank, method) for rank, method in cases])
    if settings.models[name].optional:  # a share that is too short then costs few strategies
        order = sorted(range(len(cases)), key=expected.__getitem__)
        cases, expected = [cases[i] for i in order], [expected[i] for i in order]
    arena.allowance.start(Clock.until(ends), len(cases), expected)
    for rank, method in cases:
        case = {"rank": rank, "method": method}
        report(case)
        arena.allowance.begin_strategy()
        if settings.models[name].optional and arena.allowance.over:
            report(case | {"contender": "ours", "error": OVER})
            continue
        arena.compete(arena.request(rank, method), lambda told, case=case: report(case | told))


class Arena:
    """One model, and what its strategies share."""

    def __init__(self, subject: Subject, settings: BenchmarkConfig, rates: Rates) -> None:
        self.subject = subject
        self.settings = settings
        self.chosen = settings.initialization
        # A single layer has no loss, and so no gradients.
        lossless = subject.settings.layer is not None
        self.methods = [
            name
            for name in self.chosen.methods
            if not (lossless and STRATEGIES[name].calibration == "gradients")
        ]
        self.rates = rates
        self.provisions = Provisions(subject, self.methods)
        self.allowance = Allowance(self.chosen.reserve)
        self.entrants = Entrants(self.provisions, settings, rates, self.allowance)
        self.pass_peaks: dict[str, int] = {}
        self.objectives: Mapping[str, float] = {}  # of LoftQ's exact alternation at this rank
        self.watch: HostPeak | GpuPeak | None = None  # of ours' turn, where that is watched

    def request(self, rank: int, method: str) -> Request:
        return Request(
            self.subject.task, rank, self.settings.alpha, self.settings.seed, method,
            exclude=self.chosen.exclude.get(method), names=self.subject.names,
        )  # fmt: skip

    def needs(self, requests: Sequence[Request]) -> list[float]:
        return needs(requests, self.provisions, self.rates, self.chosen)

    def plain_passes(self) -> dict[str, Any]:
        if not any(STRATEGIES[name].calibration == "inputs" for name in self.methods):
            return {}
        shape = self.subject.settings
        tokens = shape.rows * shape.row_tokens * len(self.provisions.batches)
        return {"plain": self.provisions.plain_seconds, "tokens": tokens}

    def compete(self, request: Request, report: Report) -> None:
        """One strategy at one rank: calibration, its peak, then turns until everyone has left."""
        plan = self.provisions.plan(request)
        report({"doing": "calibration"})
        seconds, note = self.provisions.calibrate(request)
        report({"pass": seconds, "note": note})
        report({"shapes": self.provisions.read_shapes(request, plan.targets)})
        self.objectives, self.watch = {}, None
        whole = self.watched_in_its_turn(request, plan)
        if not whole:
            report({"doing": "peak memory"})
            report(self.peak(request, plan))
        contenders = self.entrants.contenders(request, plan, report)
        if whole:
            contenders = {name: self.watched(name, each) for name, each in contenders.items()}
        spent: dict[str, float] = defaultdict(float)
        first: dict[str, dict[str, Any]] = {}
        for turn in take_turns(
            contenders, self.chosen.repetitions, self.subject.device, request.method
        ):
            if isinstance(turn.result, Exception):
                del contenders[turn.contender]
                report({"contender": turn.contender, "error": reason(turn.result)})
                continue
            if self.watch is not None and turn.round == 0 and turn.contender == "ours":
                report(self.peak_of_the_turn(plan))
            if turn.round == 0:
                report({"doing": f"quality of {NAMES[turn.contender.removesuffix(BARE)]}"})
            told = self.told(turn, request)
            report(told)
            first.setdefault(turn.contender, told)
            spent[turn.contender] += turn.seconds
            partner = turn.contender.removesuffix(BARE)
            over = spent[turn.contender] >= self.chosen.budget or self.allowance.free <= 0
            if partner not in contenders or over:
                del contenders[turn.contender]
            del turn  # the adapted copy, before there is another one
        self.entrants.remember(first, request)

    # -- what is told ------------------------------------------------------------------------------

    def peak(self, request: Request, plan: Plan) -> dict[str, Any]:
        """Of ours above the model, beside what the plan allows and a forward pass needs, in MiB.

        Of the judged layers alone, on both sides: a call that is watched is another call, and each
        layer's memory is handed back before the next one's is taken. `memory` watches all layers.
        """
        judged = set(self.provisions.references.judged)
        plan = plan.only([target.name for target in plan.targets if target.name in judged])
        request = replace(request, names=tuple(t.name for t in plan.targets), exclude=None)
        data = self.provisions.short_data(request)
        allowed = plan.factor_bytes + plan.workspace_bytes + plan.statistics_bytes
        largest = max((target.shape for target in plan.targets), key=math.prod)
        with handing_back():  # the copy, too: what it frees later is no room for something else
            warm_up("ours", request, largest, self.subject.device)
            model = copy.deepcopy(self.subject.model)
            if data is not None:
                allowed += self.pass_peak(request)
            watch = peak_watch(self.subject.device)
            adapted = adapt_ours(model, request, data)
            rise = watch.rise()
        del adapted, model
        return {"peak": rise / MIB, "allowed": allowed / MIB, "note": watch.note}

    def watched_in_its_turn(self, request: Request, plan: Plan) -> bool:
        """Whether a call of its own for the peak would cost as much again as the strategy itself.

        What takes so long works on large matrices, whose blocks glibc hands back by itself.
        """
        judged = set(self.provisions.references.judged)
        shapes = [target.shape for target in plan.targets if target.name in judged]
        return floor(request.method, shapes, request.rank, self.rates) > DEAR_FLOOR

    def watched(self, name: str, contender: Contender) -> Contender:
        """The same, its first turn from a heap without free blocks, as that of everyone else."""

        def prepare(number: int) -> Any:
            prepared = contender.prepare(number)
            if number == 0 and name == "ours":
                self.watch = peak_watch(self.subject.device)
            elif number == 0:
                release_to_system()
            return prepared

        return replace(contender, prepare=prepare)

    def peak_of_the_turn(self, plan: Plan) -> dict[str, Any]:
        rise, note = self.watch.rise(), self.watch.note
        told = "peak: of the timed call, on all layers, without a pass"
        return {
            "peak": rise / MIB,
            "allowed": (plan.factor_bytes + plan.workspace_bytes) / MIB,
            "note": "; ".join(filter(None, (told, note))),
        }

    def pass_peak(self, request: Request) -> int:
        """Of a plain pass over the strategy's short data, in bytes."""
        kind = request.strategy.calibration
        if kind not in self.pass_peaks:
            watch = peak_watch(self.subject.device)
            self.provisions.forward(self.provisions.short_data(request)[0], kind == "gradients")
            self.pass_peaks[kind] = watch.rise()
        return self.pass_peaks[kind]

    def told(self, turn: Turn, request: Request) -> dict[str, Any]:
        """A turn as a report, with the quality of each contender's first one."""
        told = {"contender": turn.contender, "round": turn.round, "seconds": turn.seconds}
        if turn.contender == "exact":
            if request.method == "loftq":
                self.objectives = turn.result.results
            return told | {"seconds": turn.result.seconds}
        if turn.contender.endswith(BARE):
            return told
        adapted, watch = turn.result
        if request.strategy.calibration is not None:
            told["calibration"] = self.pass_seconds(turn.contender, adapted, watch, request)
        if turn.round == 0:
            actual = quality.logits(adapted, self.provisions.probe)
            told["gap"] = quality.output_gap(actual, self.provisions.expected_logits)
            told["quality"] = judge(
                turn.contender, adapted, request, self.provisions.references, self.objectives
            )
        return told

    def pass_seconds(
        self, contender: str, adapted: Any, watch: Stopwatch, request: Request
    ) -> float:
        """What a call took for its pass over the data, ours for checking the calibration at hand.

        PEFT's EVA decomposes within its hooks: its passes count as so many plain ones.
        """
        if contender == "ours":
            return adapted.init_report().seconds["calibration"]
        if request.method == "eva":
            plain = self.provisions.plain_seconds
            return watch.calls * sum(plain) / len(plain)
        return watch.seconds


def reason(error: Exception) -> str:
    return str(error) if isinstance(error, OutOfTime) else f"fails: {brief(error)}"
