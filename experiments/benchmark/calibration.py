"""The time of the calibration pass, as a multiple of plain forward passes over the same batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from statistics import median

import torch

import lora_init

from .row import Case, Row
from .schema import BenchmarkConfig
from .timing import Contender, alternate, paired_ratio
from .workload import load_workload

TITLE = "Calibration"
TARGETS = {
    "all linear layers": "all-linear",
    "query and value": r".*(query|value|q_proj|v_proj)",
}


def cases(settings: BenchmarkConfig) -> Iterator[Case]:
    for name in settings.calibration.models:
        for layers in TARGETS:
            yield Case("calibration", name, layers, partial(measure, settings, name, layers))


def measure(settings: BenchmarkConfig, name: str, layers: str) -> Iterator[Row]:
    workload = load_workload(name, settings)
    model, batches = workload.model.eval(), workload.calibration_batches()
    # Any method that reads second moments.
    config = lora_init.LoraConfig(
        r=1,
        target_modules=TARGETS[layers],
        init_lora_weights="eva",
        task_type=workload.settings.task,
    )

    @torch.no_grad()
    def forward(_: None) -> None:
        for batch in batches:
            model(**batch)

    contenders = {
        "plain": Contender(lambda: None, forward),
        "observed": Contender(lambda: None, lambda _: lora_init.calibrate(model, config, batches)),
    }
    chosen, seconds = settings.calibration, defaultdict(list)
    lora_init.calibrate(model, config, [{key: part[:1] for key, part in batches[0].items()}])
    for turn in alternate(contenders, chosen.rounds, chosen.budget, workload.device):
        seconds[turn.name].append(turn.seconds)
    ratio = paired_ratio(seconds["observed"], seconds["plain"])
    yield Row(
        "calibration", name, layers, ours=median(seconds["observed"]),
        whole=median(seconds["plain"]), ratio=ratio, peer="plain passes",
        note=f"{sum(batch['input_ids'].numel() for batch in batches):,} tokens",
    )  # fmt: skip
