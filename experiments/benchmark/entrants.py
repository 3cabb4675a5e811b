"""Who takes part in a strategy's turns: what each is handed, how long it may take, who stays out.

Ours always takes part. A peer does not where its time is known from a strategy that needed the same
full decomposition, where the settings leave it out, or where it would take too long.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from experiments.benchmark.cases import BARE, NAMES
from experiments.benchmark.clock import Allowance
from experiments.benchmark.contenders import (
    Request,
    Stopwatch,
    adapt_ours,
    adapt_peft,
    warm_up,
)
from experiments.benchmark.exact import COMPUTATIONS, expected
from experiments.benchmark.limits import time_limit
from experiments.benchmark.provisions import Provisions
from experiments.benchmark.rates import Rates
from experiments.benchmark.sampling import choose, compute
from experiments.benchmark.settings import BenchmarkConfig
from experiments.benchmark.timing import Contender
from lora_init.plan.plan import Plan

Report = Callable[[dict], None]
WORTH_REMEMBERING = 2.0  # seconds: below, a decomposition is measured wherever it is needed


def ours(model: Any, data: Any, request: Request) -> tuple[Any, Stopwatch]:
    return adapt_ours(model, request, data), Stopwatch()


def peft(model: Any, data: Any, request: Request) -> tuple[Any, Stopwatch]:
    watch = Stopwatch()
    return adapt_peft(model, request, data, watch), watch


CALLS = {"ours": ours, "peft": peft}
"""By contender: (model, data, request) -> the adapted model and the clock of its passes."""


class Entrants:
    """Of one model.

    Attributes:
        remembered: seconds of full decompositions, by contender and what is decomposed.
    """

    def __init__(
        self,
        provisions: Provisions,
        settings: BenchmarkConfig,
        rates: Rates,
        allowance: Allowance,
    ) -> None:
        self.provisions = provisions
        self.subject = provisions.subject
        self.chosen = settings.initialization
        self.rates = rates
        self.allowance = allowance
        self.remembered: dict[tuple[str, str], float] = {}

    def contenders(self, request: Request, plan: Plan, report: Report) -> dict[str, Contender]:
        """By name; why somebody does not take part is reported."""
        strategy, taking = request.strategy, {}
        sample = None
        if strategy.exact is not None:
            shapes = self.provisions.read_shapes(request, plan.targets)
            sample = choose(
                strategy.exact, plan.targets, shapes, self.rates, self.chosen.exact_limit
            )
        # The exact computation is first: LoftQ's is what the others are judged by.
        needed = 0.0 if sample is None else sample.needed
        if sample is not None and self.invited("exact", request, needed, report):
            if sample.note:
                report({"note": sample.note})
            taking["exact"] = self.limited(
                "exact",
                request,
                lambda _: self.provisions.given(request, plan),
                lambda given: compute(strategy.exact, given, sample, self.subject.device),
            )
        taking |= self.adapting("ours", request)
        whole = expected(strategy.exact, shapes, self.rates) if strategy.full else 0.0
        if self.invited("peft", request, whole, report):
            taking |= self.adapting("peft", request)
        return {name: announced(name, each, report) for name, each in taking.items()}

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
            allowed = seconds
            if contender == "peft":
                allowed = min(seconds, max(self.allowance.free, self.chosen.reserve, 1.0))
            try:
                with time_limit(allowed):
                    return run(prepared)
            except Exception as error:  # whatever it is, it belongs into the row
                return error

        return Contender(prepare, attempt)

    def invited(self, contender: str, request: Request, needed: float, report: Report) -> bool:
        """Whether a peer is to be run, which takes `needed` seconds as far as that can be told:
        not where it was measured before, is not wanted, or would take too long.
        """
        known = self.remembered.get((contender, memory_key(contender, request)))
        if known is not None:
            report({"contender": contender, "round": 0, "seconds": known, "remembered": True})
            return False
        wanted = getattr(self.subject.settings, contender)
        # A wanted ratio has a peer before anything has a second turn, or a second peer.
        aimed = request.method in self.subject.settings.targets
        about = f", about {needed:.0f} s" if needed >= 1 else ""
        if (wanted is not None and request.method not in wanted) or needed > self.chosen.peer_limit:
            refusal = f"not run{about}"
        elif (short := self.allowance.refusal(needed, contender == "exact" and aimed)) is not None:
            refusal = f"not run: {short}"
        else:
            return True
        report({"contender": contender, "error": refusal})
        return False

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


def announced(contender: str, taking: Contender, report: Report) -> Contender:
    """The same contender, each of whose turns is told of before it is prepared."""
    whose = NAMES[contender.removesuffix(BARE)]

    def prepare(number: int) -> Any:
        report({"doing": f"{whose}, turn {number + 1}"})
        return taking.prepare(number)

    return replace(taking, prepare=prepare)


def memory_key(contender: str, request: Request) -> str:
    """What a contender computes, where that depends on no rank; "" where it does."""
    strategy = request.strategy
    if contender == "exact" and strategy.exact and not COMPUTATIONS[strategy.exact].by_rank:
        return strategy.exact
    return str(strategy.peft) if contender == "peft" and strategy.full else ""
