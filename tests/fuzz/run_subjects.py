"""Folders of the experiments: a training checkpoint, and a finished run as a report reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from subjects import SUBJECTS, Subject, generators, network
from synthetic_sweeps import write_run

from experiments import errors
from experiments.report.archive import gather
from experiments.report.sweeps import load_sweeps
from experiments.run.files import write_bytes
from experiments.run.folder import RunFolder
from experiments.run.metrics import MetricsFile
from experiments.run.resume import checksums, read_checkpoint
from experiments.training.checkpoint import Checkpoints, Progress
from lora_init import LoraConfig, LoraModel, get_peft_model

CONFIG = LoraConfig(r=2, target_modules=["query_projection"], init_lora_weights="pissa")


class Checkpoint(Subject):
    """A run in the middle of its training, read and put into a model and an optimizer."""

    kind = "checkpoint"
    refusals = (errors.DamagedFile,) if hasattr(errors, "DamagedFile") else ()

    def write(self, folder: Path) -> None:
        self.accelerator = Accelerator(cpu=True)
        run = RunFolder("0123456789", folder)
        run.init_file.write_text(json.dumps({"seconds": {"total": 1.0}, "layers": []}))
        with MetricsFile(run.metrics_file) as metrics:
            for step in (1, 2):
                metrics.append({"step": step, "split": "train", "loss": 0.5 / step})
            size = metrics.size
        model, optimizer, schedule = started()
        for _ in range(2):
            output = model.base_model["encoder_layers_attention"](torch.randn(4, 8))
            output.square().mean().backward()
            optimizer.step()
            schedule.step()
        checkpoints = Checkpoints(
            lambda content: write_bytes(run.checkpoint_file, content),
            lambda: {"run_id": run.id, "metrics_size": size, "files": checksums(run, size)},
        )
        checkpoints.progress = Progress(2, 64, 1.0, {"total": 1.0})
        checkpoints.write(model, optimizer, schedule, self.accelerator)

    def read(self, folder: Path) -> Mapping[str, Any] | None:
        run = RunFolder("0123456789", folder)
        saved = read_checkpoint(run)
        if saved is None:
            return None
        with MetricsFile(run.metrics_file, saved.metrics_size) as metrics:
            rows = metrics.earlier
        model, optimizer, schedule = self.parts
        try:
            model.load_state_dict(saved.part("model."))
        except ValueError:  # said to the user, and the run starts over
            return None
        checkpoints = Checkpoints(run, saved)
        checkpoints.restore(optimizer, schedule, self.accelerator)
        checkpoints.restore_generators(self.accelerator)
        state = optimizer.state_dict()
        moments = {
            f"optimizer.{number}.{name}": value
            for number, values in state["state"].items()
            for name, value in values.items()
        }
        return {
            **{f"model.{name}": value.clone() for name, value in model.state_dict().items()},
            **moments,
            "groups": state["param_groups"],
            "schedule": schedule.state_dict()["last_epoch"],
            "progress": checkpoints.progress,
            "rows": rows,
            "init": json.loads(run.init_file.read_text()),
        }

    def renew(self) -> None:
        self.parts = started()

    def wrong(self, found: Mapping[str, Any]) -> str:
        """Whatever is resumed must be what was saved."""
        return super().wrong(found) or ("" if self.equal(found) else "another value is resumed")


def started() -> tuple[LoraModel, torch.optim.Optimizer, Any]:
    model = get_peft_model(network(), CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


class FinishedRun(Subject):
    """A finished run, gathered for a report: it is read, or named among the problems."""

    kind = "finished run"
    refusals = ()

    def write(self, folder: Path) -> None:
        write_run(
            folder / "run", "pissa", 0, examples=40, steps=5, blocks=1, validated=True, ended=True
        )

    def read(self, folder: Path) -> Mapping[str, Any] | None:
        cache = folder.parent / "tables"
        shutil.rmtree(cache, ignore_errors=True)
        RunFolder("run", folder / "run").finished()
        try:
            sweep = load_sweeps([folder])
        except (FileNotFoundError, ValueError):  # the only run is gone: an error that says so
            return None
        gathered = gather(sweep, cache, lambda text: None)
        if gathered.problems or not len(gathered.runs):
            return None
        return {name: len(getattr(gathered, name)) for name in ("runs", "layers", "metrics")}

    def change(self) -> str:
        before, self.generators = getattr(self, "generators", generators()), generators()
        return "" if before == self.generators else "a random state"


SUBJECTS |= {subject.kind: subject for subject in (Checkpoint, FinishedRun)}
