"""The time of `get_peft_model` for every method, and the error of the factors.

Passes over calibration data are excluded for all contenders. Where peers decompose whole matrices,
all contenders adapt the same sample of layers; our time for the whole model is a separate figure.
"""

from __future__ import annotations

import copy
import gc
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from .contenders import Passes, Request, adapt_ours, adapt_peft, factors
from .material import Material
from .quality import JUDGES
from .reference import FORMULAS, Given
from .row import LINALG, OURS, PEFT, Case, Row
from .schema import BenchmarkConfig
from .timing import Contender, Turn, alternate, paired_ratio

TITLE = "Initialization"
WHOLE = "lora_init, whole model"


def cases(settings: BenchmarkConfig) -> Iterator[Case]:
    for name in settings.initialization.models:
        chosen, starts = settings.models[name], Starts(name, settings)
        for rank in chosen.ranks:
            for method in settings.initialization.methods:
                if chosen.methods is None or method in chosen.methods:
                    measure = partial(starts.measure, rank, method)
                    yield Case("initialization", name, method, measure, rank)


class Starts(Material):
    """The comparison of the methods on one model."""

    def measure(self, rank: int, method: str) -> Iterator[Row]:
        """Time the contenders of one method in alternation."""
        request, whole = self.request(rank, method), None
        if request.strategy.decomposes and len(self.sample) < len(self.shapes):
            whole, request = request, replace(request, names=self.sample)
        given = self.given(request)
        taking, notes = self.contenders(request, whole, given), []
        seconds, errors = defaultdict(list), {}
        for turn in self.turns(taking):
            if isinstance(turn.result, Exception):
                notes.append(f"{turn.name} failed: {turn.result}")
                continue
            seconds[turn.name].append(turn.seconds)
            if turn.name in (OURS, PEFT):
                adapted, passed = turn.result
                seconds[turn.name][-1] -= passed
                # PEFT's CorDA scales R in another way, so its factors have another optimum.
                if turn.round == 0 and not (turn.name == PEFT and method.startswith("corda")):
                    errors[turn.name] = self.error(request, factors(adapted), given)
                del adapted
            del turn
            gc.collect()
        yield self.row(request, whole, seconds, errors, notes)

    def turns(self, taking: Mapping[str, Contender]) -> Iterator[Turn]:
        chosen = self.settings.initialization
        return alternate(taking, chosen.rounds, chosen.budget, self.workload.device)

    def row(
        self,
        request: Request,
        whole: Request | None,
        seconds: Mapping[str, list[float]],
        errors: Mapping[str, float | None],
        notes: list[str],
    ) -> Row:
        medians = {name: median(found) for name, found in seconds.items()}
        peer = PEFT if PEFT in medians else LINALG
        ratio = paired_ratio(seconds[peer], seconds[OURS]) if peer in medians else None
        if whole is not None:
            notes.insert(0, f"{len(request.names)} of {len(self.shapes)} layers")
        judge = JUDGES.get(request.method)
        return Row(
            "initialization", self.name, request.method, request.rank,
            ours=medians.get(OURS), peft=medians.get(PEFT), linalg=medians.get(LINALG),
            whole=medians.get(WHOLE), ratio=ratio, peer=peer,
            error=errors.get(OURS), peft_error=errors.get(PEFT),
            kind=judge.kind if judge else "", note="; ".join(dict.fromkeys(notes)),
        )  # fmt: skip

    def contenders(
        self, request: Request, whole: Request | None, given: Mapping[str, Given]
    ) -> dict[str, Contender]:
        strategy = request.strategy
        compared = self.chosen.peers is None or request.method in self.chosen.peers
        taking = {OURS: self.ours(request)}
        if compared and strategy.peft is not None:
            taking[PEFT] = self.peft(request)
        if compared and strategy.formula is not None:
            taking[LINALG] = Contender(
                lambda: {name: layer.to(torch.float32) for name, layer in given.items()},
                partial(compute, strategy.formula),
            )
        if whole is not None:
            taking[WHOLE] = self.ours(whole)
        if strategy.reads is None:  # load code and buffers; one small layer is enough
            smallest = min(self.shapes, key=lambda name: (self.shapes[name], name))
            small = replace(request, names=(smallest,))
            for contender in (self.ours(small), forgiving(self.peft(small))):
                contender.run(contender.prepare())
        # A peer that fails stops taking part. Our own failure ends the benchmark.
        return {
            name: contender if name in (OURS, WHOLE) else forgiving(contender)
            for name, contender in taking.items()
        }

    def ours(self, request: Request) -> Contender:
        return Contender(
            lambda: (copy.deepcopy(self.workload.model), self.statistics(request)),
            lambda prepared: (adapt_ours(prepared[0], request, prepared[1]), 0.0),
        )

    def peft(self, request: Request) -> Contender:
        reads = request.strategy.reads
        batches = self.batches[reads] if reads else []
        if reads and request.names is None:  # its CorDA and LoRA-GA ignore "all-linear"
            request = replace(request, names=tuple(self.shapes))

        def run(model: nn.Module) -> tuple[nn.Module, float]:
            passes = Passes(self.workload.device)
            return adapt_peft(model, request, batches, passes), passes.seconds

        return Contender(lambda: copy.deepcopy(self.workload.model), run)


def compute(formula: str, given: Mapping[str, Given]) -> None:
    """Run the textbook computation; layers share that of their common inputs."""
    done = set()
    for layer in given.values():
        if formula == "eigh":
            if id(layer.covariance) in done:
                continue
            done.add(id(layer.covariance))
        FORMULAS[formula](layer)


def forgiving(contender: Contender) -> Contender:
    """Return the same contender; its failure becomes its result, and it skips later rounds."""
    failed: list[Exception] = []

    def run(prepared: Any) -> Any:
        if failed:
            return failed[0]
        try:
            return contender.run(prepared)
        except Exception as error:
            failed.append(error)
            return error

    return replace(contender, run=run)
