"""What the strategies share on one model: batches, plain passes, truths, and the one calibration
that the strategy at hand reads. All of it is made outside the clocks of their turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import lora_init
from experiments.benchmark import quality
from experiments.benchmark.contenders import Request, Stopwatch, our_config, our_plan
from experiments.benchmark.exact import Given, distinct
from experiments.benchmark.references import References
from experiments.benchmark.subjects import Batch, Subject
from lora_init.plan.plan import Plan
from lora_init.weights.kinds import oriented_weight

GRADIENT_BATCHES = 1
SHORT_TOKENS = 512


class Provisions:
    """Of one subject.

    Attributes:
        calibration: what the strategy at hand reads, None for those that read no data. It is never
            handed to an initialization itself, which would keep what it computed in it: two
            strategies that read the same statistics get copies of them as they were collected.
        collecting: strategies whose statistics are collected together, where a pass can serve them.
    """

    def __init__(self, subject: Subject, collecting: Sequence[str] = ()) -> None:
        self.subject = subject
        self.calibration: lora_init.Calibration | None = None
        self.collecting = collecting
        self.collected: list[Collected] = []

    def plan(self, request: Request) -> Plan:
        """What ours would do."""
        return our_plan(self.subject.model, request)

    def weight(self, name: str) -> Tensor:
        return oriented_weight(self.subject.model.get_submodule(name)).detach().float()

    # -- batches -----------------------------------------------------------------------------------

    def data(self, request: Request) -> list[Batch] | None:
        kind = request.strategy.calibration
        return {"inputs": self.batches, "gradients": self.labelled}[kind] if kind else None

    @cached_property
    def batches(self) -> list[Batch]:
        return self.subject.calibration_batches(self.subject.settings.batches)

    @cached_property
    def labelled(self) -> list[Batch]:
        if self.subject.task is None:  # a single layer, which has no loss
            return []
        return self.subject.training_batches(GRADIENT_BATCHES)

    @cached_property
    def probe(self) -> Batch:
        """What everyone is asked at step 0: a row of a language model has logits enough."""
        batch = (self.labelled or self.batches)[0]
        return batch if self.subject.task == "SEQ_CLS" else first_rows(batch, 1)

    def short_data(self, request: Request) -> list[Batch] | None:
        """A few rows of a batch, for what needs a pass but not its time: the statistics of few
        tokens are as large as those of many.
        """
        data = self.data(request)
        if data is None:
            return None
        rows = len(next(iter(data[0].values())))
        return [first_rows(data[0], max(1, rows * SHORT_TOKENS // self._tokens(data[0])))]

    @staticmethod
    def _tokens(batch: Batch) -> int:
        found = batch.get("input_ids")
        return len(batch["x"]) if found is None else found.numel()

    @cached_property
    def expected_logits(self) -> Tensor:
        return quality.logits(self.subject.model, self.probe)

    # -- passes ------------------------------------------------------------------------------------

    def forward(self, batch: Batch, gradients: bool = False) -> None:
        with torch.set_grad_enabled(gradients):
            result = self.subject.model.eval()(**batch)
            if gradients:
                result.loss.backward()
        self.subject.model.zero_grad(set_to_none=True)

    @cached_property
    def plain_seconds(self) -> list[float]:
        """Of a plain forward pass over each calibration batch."""
        self.forward(self.batches[0])
        watches = [Stopwatch() for _ in self.batches]
        for watch, batch in zip(watches, self.batches, strict=True):
            watch(lambda batch=batch: self.forward(batch), self.subject.device)
        return [watch.seconds for watch in watches]

    def calibrate(self, request: Request) -> tuple[float, str]:
        """Collect what the strategy reads, or find it collected; returns the seconds of the pass,
        and whose it was if another strategy has the same statistics.
        """
        self.calibration = None
        if request.strategy.calibration is None:
            return 0.0, ""
        plan = self.plan(request)
        names, kind = [target.name for target in plan.targets], plan.calibration
        known = [found for found in self.collected if found.serves(names, kind)]
        found = known[0] if known else self._collect(request, kind)
        layers = found.calibration.requests[kind]
        self.calibration = replace(found.calibration, requests={kind: layers})
        if request.strategy.calibration == "inputs":
            self.references.read({name: layers[name].inputs for name in names})
        return found.seconds, f"our pass: one with {found.method}'s" if known else ""

    def _collect(self, request: Request, kind: lora_init.CalibrationRequest) -> Collected:
        """One pass for the strategy and for those that read sums of the same precision."""
        together = [replace(request, method=method) for method in self.collecting]
        wanted = [our_config(request)] + [
            our_config(other)
            for other in together
            if other.strategy.calibration == request.strategy.calibration == "inputs"
            and self.plan(other).calibration.smallest == kind.smallest
        ]
        watch, data = Stopwatch(), self.data(request)
        made = watch(
            lambda: lora_init.calibrate(self.subject.model, wanted, data), self.subject.device
        )
        found = Collected(made, watch.seconds, request.method)
        if self.subject.device.type != "cpu":  # where memory is scarce, and a pass is cheap
            self.collected.clear()
        if request.strategy.calibration == "inputs":  # gradients are as large as the model
            self.collected.append(found)
        return found

    # -- for peers and judges ----------------------------------------------------------------------

    @cached_property
    def references(self) -> References:
        settings = self.subject.settings
        whole = Request(self.subject.task, 1, 1.0, self.subject.seed, names=self.subject.names)
        return References(self.subject, self.plan(whole).targets, max(settings.ranks))

    def read_shapes(self, request: Request, targets: Sequence[Any]) -> list[tuple[int, int]]:
        """Of what a strategy decomposes: the weights, or for EVA each distinct covariance."""
        if request.method != "eva":
            return [target.shape for target in targets]
        layers = self.calibration.layers
        moments = {t.name: layers[t.name].inputs.covariance for t in targets}
        return [tuple(moment.shape) for moment in distinct(moments)]

    def given(self, request: Request, plan: Plan) -> Given:
        """What the exact computation starts from."""
        names = [target.name for target in plan.targets]
        kind = request.strategy.calibration
        layers = {} if self.calibration is None else self.calibration.layers
        inputs = {name: layers[name].inputs for name in names} if kind == "inputs" else {}
        moments = {id(found): found.second_moment.float() for found in inputs.values()}
        return Given(
            weights={name: self.weight(name) for name in names},
            moments={name: moments[id(found)] for name, found in inputs.items()},
            gradients={n: layers[n].gradient for n in names} if kind == "gradients" else {},
            rank=request.rank,
        )


@dataclass(frozen=True)
class Collected:
    """One pass, its seconds, and the strategy that it was made for."""

    calibration: lora_init.Calibration
    seconds: float
    method: str

    def serves(self, names: Sequence[str], kind: lora_init.CalibrationRequest) -> bool:
        layers = self.calibration.requests.get(kind)
        return layers is not None and all(name in layers for name in names)


def first_rows(batch: Batch, count: int) -> Batch:
    return {key: value[:count] for key, value in batch.items()}
