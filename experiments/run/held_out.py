"""The held-out splits in a result, and the test set of a run that was trained earlier.

Choosing a learning rate by its test score favors the method with the most settings. A run with
`read_test=false` therefore leaves the test set unread. When the setting is chosen, the same run
with `read_test=true` is not trained again: its saved adapter is loaded and scored.
"""

from __future__ import annotations

import io
import json
import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from lora_init import LoraModel

from ..config.run_config import RunConfig
from ..console import say
from ..data import Splits, load_data
from ..errors import ConfigurationError, DamagedFile
from ..models import load_model
from ..tasks import Evaluation, Task, make_task
from ..training.evaluate import evaluate
from .files import write_bytes, write_json, write_text
from .folder import RunFolder
from .metrics import read_metrics, recording
from .start import on_device


def refuse_unscorable(run: RunConfig, data: Splits) -> None:
    """Refuse, before training, a run that could not be scored.

    Raises:
        ConfigurationError: a validation or a test is asked for that cannot take place.
    """
    settings = run.training
    if data.task_type == "CAUSAL_LM" and settings.generate_limit == 0:
        raise ConfigurationError(
            "training.generate_limit=0 is not supported for language models: must be an integer "
            ">= 1. The score is the share of right generated answers."
        )
    if settings.validate_every and not data.validation:
        raise ConfigurationError(
            "training.validate_every is set, and the validation split is empty. Raise "
            "data.validation_limit, or set training.validate_every=0."
        )
    if run.read_test:
        return
    if not (data.validation and settings.validate_at_end):
        missing = (
            f"training.validate_at_end={str(settings.validate_at_end).lower()}"
            if data.validation
            else "an empty validation split"
        )
        raise ConfigurationError(
            f"read_test=false with {missing} leaves nothing to score the run by. Set "
            "training.validate_at_end=true and data.validation_limit=null, or read_test=true."
        )
    if not settings.save_adapter:
        raise ConfigurationError(
            "read_test=false with training.save_adapter=false is not supported: a later test "
            "needs the adapter. Set training.save_adapter=true."
        )


def validation_fields(task: Task, validation: Evaluation | None) -> dict[str, Any]:
    """The fields of `result.json` for the validation split after the last step."""
    figures = None if validation is None else validation.metrics
    return {
        "validation_score": None if figures is None else figures[task.metric],
        "validation": figures,
    }


def test_fields(task: Task, data: Splits, test: Evaluation | None) -> dict[str, Any]:
    """The fields of `result.json` for the test set; null in each while it is unread."""
    if test is None:
        unread = ("score", "n_test", "majority", "loss_test", "test")
        return {"tested": False, **dict.fromkeys(unread)}
    return {
        "tested": True,
        "score": test.metrics[task.metric],
        "n_test": len(test.ids),
        "majority": task.majority(data.test),
        "loss_test": test.metrics["loss"],
        "test": test.metrics,
    }


def write_predictions(folder: RunFolder, test: Evaluation) -> None:
    """Write each test example's outcome to `predictions.npz`, and texts to `answers.jsonl`."""
    archive = io.BytesIO()
    np.savez(archive, id=test.ids, correct=test.correct, score=test.score)
    write_bytes(folder.path / "predictions.npz", archive.getvalue())
    if test.said is not None:
        rows = zip(test.ids.tolist(), test.correct.tolist(), test.said, strict=True)
        lines = [
            json.dumps({"id": number, "correct": right, "ended": said.ended, "said": said.text})
            for number, right, said in rows
        ]
        write_text(folder.path / "answers.jsonl", "\n".join(lines) + "\n")


def outcome(result: dict[str, Any]) -> str:
    """The result in a few words."""
    metric = result.get("metric", "score")
    if result["tested"]:
        return f"{metric} {readable(result.get('score'))}"
    return f"validation {metric} {readable(result.get('validation_score'))}, test set unread"


def readable(score: float | None) -> str:
    return "not known" if score is None else f"{score:.4f}"


def read_test_set(
    run: RunConfig, folder: RunFolder, result: dict[str, Any], accelerator: Accelerator
) -> dict[str, Any]:
    """Score a finished, untested run by its saved adapter; returns the completed result.

    The figures equal those of a run tested at once, up to the rounding of the rebuilt base.

    Raises:
        DamagedFile: its adapter or its metrics are missing, damaged, or made for another base.
    """
    started = time.monotonic()
    kept = size_before_test(folder)
    data = load_data(run.data)
    loaded = load_model(
        run.model, task_type=data.task_type, labels=data.labels, head_seed=run.seeds.head
    )
    base = on_device(loaded, accelerator.device)
    try:
        model = LoraModel.from_pretrained(
            base,
            folder.path / "adapter",
            is_trainable=False,
            original_weights=loaded.original_weights,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # its type depends on what is wrong with the files
        raise DamagedFile(folder.path / "adapter", error) from error
    task = make_task(data.task_type, loaded.tokenizer, run.training, data.judge)
    test = evaluate(model, task, data.test, run.training, accelerator)
    completed = {
        **result,
        **test_fields(task, data, test),
        "test_seconds": time.monotonic() - started,
        "tested_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if accelerator.is_main_process:
        write_predictions(folder, test)
        with recording(run, folder, True, kept) as (record, _):
            record({"step": result["steps"], "split": "test", **test.metrics})
        write_json(folder.result_file, completed)
        say(f"  {task.metric} {completed['score']:.4f} on the test set -> {folder.path}")
    accelerator.wait_for_everyone()
    return completed


def size_before_test(folder: RunFolder) -> int:
    """Bytes of metrics.jsonl without the last rows, which an interrupted test has written.

    Raises:
        DamagedFile: it does not hold rows.
    """
    size = 0
    rows = read_metrics(folder.metrics_file)
    lines = [line for line in folder.metrics_file.read_bytes().split(b"\n") if line]
    for line, row in zip(lines, rows, strict=True):
        if row["split"] == "test":
            break
        size += len(line) + 1
    return size
