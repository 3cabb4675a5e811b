"""What all methods share on one model: its layers, batches, statistics and float64 results."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import lora_init
from lora_init.weights.kinds import oriented_weight

from .contenders import LayerFactors, Request, our_config, our_plan
from .quality import worst_error
from .reference import Given, Truth
from .schema import BenchmarkConfig
from .strategies import STRATEGIES
from .workload import Batch, Workload, load_workload, sampled


class Material:
    """The material of one model, made when it is first needed and outside the measured times."""

    def __init__(self, name: str, settings: BenchmarkConfig) -> None:
        self.name, self.settings = name, settings
        self.chosen = settings.models[name]

    def request(self, rank: int, method: str) -> Request:
        return Request(
            self.chosen.task, rank, self.settings.alpha, self.settings.seed, method,
            exclude=self.chosen.exclude,
        )  # fmt: skip

    @cached_property
    def workload(self) -> Workload:
        return load_workload(self.name, self.settings)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """All layers that are adapted, with their (out, in)."""
        plan = our_plan(self.workload.model, self.request(1, "kaiming"))
        return {target.name: target.shape for target in plan.targets}

    @cached_property
    def sample(self) -> tuple[str, ...]:
        return sampled(self.shapes, self.chosen.sample)

    @cached_property
    def batches(self) -> dict[str, list[Batch]]:
        """The data by what is read from it."""
        return {
            "inputs": self.workload.calibration_batches(),
            "gradients": self.workload.training_batches(1),
        }

    @cached_property
    def calibrations(self) -> dict[str, lora_init.Calibration]:
        """The statistics of all layers for all methods, one pass for each kind of data."""
        found = {}
        for kind, batches in self.batches.items():
            methods = [
                method
                for method in self.settings.initialization.methods
                if STRATEGIES[method].reads == kind
            ]
            if methods:
                configs = [our_config(self.request(1, method)) for method in methods]
                found[kind] = lora_init.calibrate(self.workload.model, configs, batches)
        return found

    def statistics(self, request: Request) -> lora_init.Calibration | None:
        """Return a copy for one call, which stores its decompositions in it."""
        if request.strategy.reads is None:
            return None
        found = self.calibrations[request.strategy.reads]
        kind = our_plan(self.workload.model, request).calibration
        layers = found.requests[kind]
        kept = {name: layers[name] for name in request.names or self.shapes}
        return copy.deepcopy(replace(found, requests={kind: kept}))

    def given(self, request: Request) -> dict[str, Given]:
        """Return what the textbook computation reads, by layer."""
        found = self.statistics(request)
        layers = {} if found is None else found.layers
        moments: dict[int, dict[str, Any]] = {}
        made = {}
        for name in request.names or self.shapes:
            weight = oriented_weight(self.workload.model.get_submodule(name)).detach().float()
            read: dict[str, Any] = {}
            if request.strategy.reads == "inputs":
                inputs = layers[name].inputs
                read = moments.setdefault(
                    id(inputs), {"moment": inputs.second_moment, "covariance": inputs.covariance}
                )
            elif request.strategy.reads == "gradients":
                read = {"gradient": layers[name].gradient}
            made[name] = Given(weight, request.rank, **read)
        return made

    @cached_property
    def truth(self) -> Truth:
        return Truth(dict(self.workload.known))

    def error(
        self, request: Request, made: Mapping[str, LayerFactors], given: Mapping[str, Given]
    ) -> float | None:
        """Return the largest error over the sampled layers."""
        judged = {name: given[name] for name in self.sample if name in given}
        return worst_error(request.method, made, judged, self.truth)
