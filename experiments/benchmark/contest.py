"""All strategies on one model, in a process of its own: turns of ours, PEFT's and torch.linalg's.

A turn of ours and of PEFT's is the whole call, on a fresh copy of the model. The same call with
`init_lora_weights=False` takes turns beside it; a round's difference is the initialization.
torch.linalg's computation stands alone. A contender leaves when its budget is used up, after one
turn at least; one that fails or finds no end leaves with its reason, and the others go on. A full
decomposition is not timed twice: its time is remembered for the strategies, and the ranks, that
need the same one.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.benchmark import quality
from experiments.benchmark.contenders import (
    Request,
    Stopwatch,
    adapt_ours,
    adapt_peft,
    warm_up,
)
from experiments.benchmark.exact import COMPUTATIONS, expected
from experiments.benchmark.isolated import brief
from experiments.benchmark.judging import judge, judge_bottom
from experiments.benchmark.limits import OutOfTime, time_limit
from experiments.benchmark.peaks import MIB, handing_back, peak_watch
from experiments.benchmark.provisions import Provisions
from experiments.benchmark.rates import Rates
from experiments.benchmark.settings import BenchmarkConfig
from experiments.benchmark.strategies import STRATEGIES
from experiments.benchmark.subjects import Subject, load_subject
from experiments.benchmark.timing import Contender, Turn, take_turns
from lora_init import linalg
from lora_init.plan import Plan

Report = Callable[[dict], None]
BARE = " without"
"""The suffix of the contender that makes the same call with `init_lora_weights=False`."""
WORTH_REMEMBERING = 2.0  # seconds: below, a decomposition is measured wherever it is needed


def contest(
    settings: BenchmarkConfig,
    report: Report,
    name: str,
    rates: Mapping[str, float],
    begun: Sequence[Sequence[Any]],
) -> None:
    """Measure every (rank, method) of the model `name` that an earlier process did not begin."""
    arena = Arena(load_subject(name, settings), settings, Rates(**rates))
    report(arena.plain_passes())
    for rank in settings.models[name].ranks:
        for method in arena.methods:
            if [rank, method] not in begun:
                case = {"rank": rank, "method": method}
                report(case)
                asked = arena.request(rank, method)
                arena.compete(asked, lambda told, case=case: report(case | told))


def ours(model: Any, data: Any, request: Request) -> tuple[Any, Stopwatch]:
    return adapt_ours(model, request, data), Stopwatch()


def peft(model: Any, data: Any, request: Request) -> tuple[Any, Stopwatch]:
    watch = Stopwatch()
    return adapt_peft(model, request, data, watch), watch


CALLS = {"ours": ours, "peft": peft}
"""By contender: (model, data, request) -> the adapted model and the clock of its passes."""


class Arena:
    """One model, what its strategies share, and the times that are remembered."""

    def __init__(self, subject: Subject, settings: BenchmarkConfig, rates: Rates) -> None:
        self.subject = subject
        self.settings = settings
        self.chosen = settings.initialization
        self.rates = rates
        # A single layer has no loss, and so no gradients.
        lossless = subject.settings.layer is not None
        self.methods = [
            name
            for name in self.chosen.methods
            if not (lossless and STRATEGIES[name].calibration == "gradients")
        ]
        self.provisions = Provisions(subject)
        self.remembered: dict[tuple[str, str], float] = {}
        self.pass_peaks: dict[str, int] = {}
        self.objectives: Mapping[str, float] = {}  # of LoftQ's exact alternation at this rank

    def request(self, rank: int, method: str) -> Request:
        return Request(
            self.subject.task, rank, self.settings.alpha, self.settings.seed, method,
            exclude=self.chosen.exclude.get(method), names=self.subject.names,
        )  # fmt: skip

    def plain_passes(self) -> dict[str, Any]:
        if not any(STRATEGIES[name].calibration == "inputs" for name in self.methods):
            return {}
        shape = self.subject.settings
        tokens = shape.rows * shape.row_tokens * len(self.provisions.batches)
        return {"plain": self.provisions.plain_seconds, "tokens": tokens}

    def compete(self, request: Request, report: Report) -> None:
        """One strategy at one rank: calibration, its peak, then turns until everyone has left."""
        plan = self.provisions.plan(request)
        report({"pass": self.provisions.calibrate(request)})
        report({"shapes": self.provisions.read_shapes(request, plan.targets)})
        if request.strategy.ours is not None:
            report(self.peak(request, plan))
        self.objectives = {}
        contenders = self.contenders(request, plan, report)
        spent: dict[str, float] = defaultdict(float)
        first: dict[str, dict[str, Any]] = {}
        for turn in take_turns(
            contenders, self.chosen.repetitions, self.subject.device, request.method
        ):
            if isinstance(turn.result, Exception):
                del contenders[turn.contender]
                report({"contender": turn.contender, "error": reason(turn.result)})
                continue
            told = self.told(turn, request)
            report(told)
            first.setdefault(turn.contender, told)
            spent[turn.contender] += turn.seconds
            partner = turn.contender.removesuffix(BARE)
            if partner not in contenders or spent[turn.contender] >= self.chosen.budget:
                del contenders[turn.contender]
            del turn  # the adapted copy, before there is another one
        self.remember(first, request)

    # -- who takes part ----------------------------------------------------------------------------

    def contenders(self, request: Request, plan: Plan, report: Report) -> dict[str, Contender]:
        """By name; why somebody does not take part is reported."""
        strategy, taking = request.strategy, {}
        # The exact computation is first: LoftQ's is what the others are judged by.
        if strategy.exact is not None and self.invited("exact", request, plan, report):
            taking["exact"] = self.limited(
                "exact",
                request,
                lambda _: self.provisions.given(request, plan),
                COMPUTATIONS[strategy.exact].run,
            )
        if strategy.ours is None:
            taking["ours"] = self.limited(
                "ours", request, lambda _: None, lambda _: self.bottom(request, plan)
            )
        else:
            taking |= self.adapting("ours", request)
        if self.invited("peft", request, plan, report):
            taking |= self.adapting("peft", request)
        return taking

    def adapting(self, contender: str, request: Request) -> dict[str, Contender]:
        """The call on fresh copies, and unless the factors are drawn the one without the method."""
        with contextlib.suppress(Exception):  # what fails here fails again, and is told
            warm_up(contender, request, (64, 64), self.subject.device)
        asked = {contender: request}
        if not request.strategy.drawn:
            asked[contender + BARE] = replace(request, method="random")
        return {
            name: self.limited(
                contender,
                wanted,
                lambda _, wanted=wanted: self.prepared(contender, wanted),
                lambda prepared, wanted=wanted: CALLS[contender](*prepared, wanted),
            )
            for name, wanted in asked.items()
        }

    def prepared(self, contender: str, request: Request) -> tuple[Any, Any]:
        """A fresh copy of the model, and what it is calibrated with.

        Ours takes what was collected before, as a sweep does; PEFT takes the batches.
        """
        data = self.provisions.data(request)
        if data is not None and contender == "ours":
            data = copy.deepcopy(self.provisions.calibration)
        return copy.deepcopy(self.subject.model), data

    def limited(
        self,
        contender: str,
        request: Request,
        prepare: Callable[[int], Any],
        run: Callable[[Any], Any],
    ) -> Contender:
        """A contender whose failure is its result, and that has to end in time."""
        seconds = self.chosen.time_limit
        if contender == "peft":
            seconds = self.chosen.limits.get(request.method, seconds)

        def attempt(prepared: Any) -> Any:
            try:
                with time_limit(seconds):
                    return run(prepared)
            except Exception as error:  # whatever it is, it belongs into the row
                return error

        return Contender(prepare, attempt)

    def invited(self, contender: str, request: Request, plan: Plan, report: Report) -> bool:
        """Whether a peer is to be run: not where it was measured before, or would take too long."""
        strategy = request.strategy
        known = self.remembered.get((contender, memory_key(contender, request)))
        if known is not None:
            report({"contender": contender, "round": 0, "seconds": known, "remembered": True})
            return False
        wanted = getattr(self.subject.settings, contender)
        needed = 0.0
        if strategy.exact is not None and (contender == "exact" or strategy.full):
            shapes = self.provisions.read_shapes(request, plan.targets)
            needed = expected(strategy.exact, shapes, self.rates)
        if (wanted is None or request.method in wanted) and needed <= self.chosen.peer_limit:
            return True
        about = f", about {needed:.0f} s" if needed >= 1 else ""
        report({"contender": contender, "error": f"not run{about}"})
        return False

    # -- what is told ------------------------------------------------------------------------------

    def peak(self, request: Request, plan: Plan) -> dict[str, Any]:
        """Of ours above the model, beside what the plan allows and a forward pass needs, in MiB."""
        data = self.provisions.data(request)
        allowed = plan.factor_bytes + plan.workspace_bytes + plan.statistics_bytes
        largest = max((target.shape for target in plan.targets), key=math.prod)
        with handing_back():  # the copy, too: what it frees later is no room for something else
            warm_up("ours", request, largest, self.subject.device)
            model = copy.deepcopy(self.subject.model)
            if data is not None:
                allowed += self.pass_peak(request)
            watch = peak_watch(self.subject.device)
            adapted = adapt_ours(model, request, data and data[:1])
            rise = watch.rise()
        del adapted, model
        return {"peak": rise / MIB, "allowed": allowed / MIB, "note": watch.note}

    def pass_peak(self, request: Request) -> int:
        """Of a plain pass over one batch of the strategy's data, in bytes."""
        kind = request.strategy.calibration
        if kind not in self.pass_peaks:
            watch = peak_watch(self.subject.device)
            self.provisions.forward(self.provisions.data(request)[0], kind == "gradients")
            self.pass_peaks[kind] = watch.rise()
        return self.pass_peaks[kind]

    def told(self, turn: Turn, request: Request) -> dict[str, Any]:
        """A turn as a report, with the quality of each contender's first one."""
        told = {"contender": turn.contender, "round": turn.round, "seconds": turn.seconds}
        if turn.contender == "exact":
            if request.method == "loftq":
                self.objectives = turn.result
            return told
        if turn.contender.endswith(BARE):
            return told
        if turn.contender == "ours" and request.strategy.ours is None:
            return told | {"quality": judge_bottom(turn.result, self.provisions.references)}
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

    def remember(self, first: Mapping[str, dict[str, Any]], request: Request) -> None:
        """Keep the times of full decompositions: PEFT's beyond its pass and the call without."""
        for contender in ("exact", "peft"):
            key = contender, memory_key(contender, request)
            if contender not in first or not key[1] or key in self.remembered:
                continue
            told, without = first[contender], first.get(contender + BARE, {"seconds": 0.0})
            seconds = told["seconds"] - told.get("calibration", 0.0) - without["seconds"]
            if seconds > WORTH_REMEMBERING:
                self.remembered[key] = seconds

    def bottom(self, request: Request, plan: Plan) -> dict[str, linalg.Decomposition]:
        """The smallest triplets of every weight."""
        return {
            target.name: linalg.bottom_singular(self.provisions.weight(target.name), request.rank)
            for target in plan.targets
        }


def memory_key(contender: str, request: Request) -> str:
    """What a contender computes, where that depends on no rank; "" where it does."""
    strategy = request.strategy
    if contender == "exact" and strategy.exact and not COMPUTATIONS[strategy.exact].by_rank:
        return strategy.exact
    return str(strategy.peft) if contender == "peft" and strategy.full else ""


def reason(error: Exception) -> str:
    return str(error) if isinstance(error, OutOfTime) else f"fails: {brief(error)}"
