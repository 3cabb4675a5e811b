"""The held-out splits in a result, and the test set read later than the training.

Choosing a learning rate by its test score flatters the method with the most settings. A run with
`read_test=false` therefore leaves the test set alone: its result has a validation score only. When
the setting has been chosen, the same run asked for with `read_test=true` is not trained again; its
saved adapter is loaded and scored.
"""

from __future__ import annotations

import io
import json
import time
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from experiments.config.schema import RunConfig
from experiments.console import say
from experiments.data import Splits, load_data
from experiments.errors import ConfigurationError, DamagedFile
from experiments.models import load_model
from experiments.run.folder import RunFolder, read_metrics, write_bytes, write_json, write_text
from experiments.run.metrics import recording
from experiments.run.start import placed
from experiments.tasks import Evaluation, Task, make_task
from experiments.training.evaluate import evaluate
from lora_init import LoraModel


def refuse_unscorable(run: RunConfig, data: Splits) -> None:
    """Find before training that a run would end with nothing to judge it by.

    Raises:
        ConfigurationError: no validation where one is asked for or is all there is, or a test
            put off whose adapter will not be there.
    """
    settings = run.training
    if data.task_type == "CAUSAL_LM" and settings.generate_limit == 0:
        raise ConfigurationError(
            "training.generate_limit=0 is not supported for language models: must be an integer "
            ">= 1. The score is the share of right answers, and none would be generated."
        )
    if settings.validate_every and not data.validation:
        raise ConfigurationError(
            "training.validate_every is set, and the validation split is empty; raise "
            "data.validation_limit, or set training.validate_every=0"
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
            f"read_test=false with {missing} leaves nothing to judge the run by; allow the "
            "validation (training.validate_at_end=true, data.validation_limit=null), or set "
            "read_test=true"
        )
    if not settings.save_adapter:
        raise ConfigurationError(
            "read_test=false with training.save_adapter=false: the test set could never be read "
            "later; set training.save_adapter=true"
        )


def validation_fields(task: Task, validation: Evaluation | None) -> dict[str, Any]:
    """What `result.json` says of the validation split after the last step."""
    figures = None if validation is None else validation.metrics
    return {
        "validation_score": None if figures is None else figures[task.metric],
        "validation": figures,
    }


def test_fields(task: Task, data: Splits, test: Evaluation | None) -> dict[str, Any]:
    """What `result.json` says of the test set: null in every field while it is unread."""
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
    """`predictions.npz`: each test example's id, whether it was answered right, and its score.

    `answers.jsonl`, where answers are generated: what was said, to hold the judge against, and
    whether the model came to its end.
    """
    archive = io.BytesIO()
    np.savez(archive, id=test.ids, correct=test.correct, score=test.score)
    write_bytes(folder.path / "predictions.npz", archive.getvalue())
    if test.said is not None:
        lines = [
            json.dumps({"id": number, "correct": right, "ended": said.ended, "said": said.text})
            for number, right, said in zip(
                test.ids.tolist(), test.correct.tolist(), test.said, strict=True
            )
        ]
        write_text(folder.path / "answers.jsonl", "\n".join(lines) + "\n")


def outcome(result: dict[str, Any]) -> str:
    """The result in a few words."""
    metric = result.get("metric", "score")
    if result["tested"]:
        return f"{metric} {told(result.get('score'))}"
    return f"validation {metric} {told(result.get('validation_score'))}, test set unread"


def told(score: float | None) -> str:
    return "not known" if score is None else f"{score:.4f}"


def read_test_set(
    run: RunConfig, folder: RunFolder, result: dict[str, Any], accelerator: Accelerator
) -> dict[str, Any]:
    """Score a finished, untested run by its saved adapter; returns the completed result.

    The figures are those of a run tested at once, up to the rounding of the rebuilt base.

    Raises:
        DamagedFile: its adapter or its metrics are gone, damaged, or another base's.
    """
    started = time.monotonic()
    kept = size_before_test(folder)
    data = load_data(run.data)
    loaded = load_model(
        run.model, task_type=data.task_type, labels=data.labels, head_seed=run.seeds.head
    )
    base = placed(loaded, accelerator.device)
    try:
        model = LoraModel.from_pretrained(
            base,
            folder.path / "adapter",
            is_trainable=False,
            original_weights=loaded.original_weights,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds, by what is wrong with its files
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
    """Bytes of metrics.jsonl without the rows of a test that was broken off, which come last.

    Raises:
        DamagedFile: it holds no such rows.
    """
    size = 0
    rows = read_metrics(folder.metrics_file)
    lines = [line for line in folder.metrics_file.read_bytes().split(b"\n") if line]
    for line, row in zip(lines, rows, strict=True):
        if row["split"] == "test":
            break
        size += len(line) + 1
    return size
