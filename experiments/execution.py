"""One run from configuration to result: data, model, initialization, training, test."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from experiments import measures
from experiments.budget import limit_steps
from experiments.config import RunConfig
from experiments.console import say, training_bar
from experiments.controls import control_of
from experiments.data import Splits, load_data
from experiments.environment import describe_environment
from experiments.evaluation import evaluate
from experiments.held_out import (
    read_test_set,
    refuse_unscorable,
    test_fields,
    validation_fields,
    write_predictions,
)
from experiments.initializing import base_again, initialize
from experiments.models import LoadedModel, load_model
from experiments.recording import recording
from experiments.runs import RunFolder, identify, write_json, write_text
from experiments.tasks import Evaluation, Task, make_task
from experiments.training import TrainingSummary, make_accelerator, train


def execute(run: RunConfig) -> dict[str, Any]:
    """Do the run, or find it done; returns what `result.json` holds.

    Raises:
        ConfigurationError: a setting that cannot work.
        RunFailed: training diverged; `failed.json` in the run's folder says where.
    """
    started = time.perf_counter()
    folder = identify(run)
    done = None if run.runtime.rerun else folder.finished()
    untested = done is not None and run.read_test and not done["tested"]
    if done is not None and not untested:
        say(f"  finished before, skipped: {folder.path} ({outcome(done)})")
        return done
    if run.runtime.threads is not None:
        torch.set_num_threads(run.runtime.threads)
    if untested:
        return read_test_set(run, folder, done)
    accelerator = make_accelerator(run.training, run.runtime.device)
    data = load_data(run.data)
    refuse_unscorable(run, data)
    loaded = load_model(
        run.model, task_type=data.task_type, labels=data.labels, head_seed=run.seeds.head
    )
    if accelerator.is_main_process:
        folder.start_over()
        write_text(folder.path / "config.yaml", yaml.safe_dump(asdict(run), sort_keys=False))
        write_json(folder.path / "environment.json", describe_environment())
    accelerator.wait_for_everyone()
    try:
        return carry_out(run, folder, data, loaded, accelerator, started)
    except Exception as error:
        if accelerator.is_main_process:
            facts = getattr(error, "facts", {})
            kind = type(error).__name__
            failure = {"run_id": folder.id, "error": kind, "message": str(error), **facts}
            write_json(folder.path / "failed.json", failure)
        raise
    finally:
        accelerator.free_memory()


def carry_out(
    run: RunConfig,
    folder: RunFolder,
    data: Splits,
    loaded: LoadedModel,
    accelerator: Accelerator,
    started: float,
) -> dict[str, Any]:
    """Initialize, train, test and write, in that order; `result.json` last.

    Args:
        started: when the run began, on time.perf_counter's clock.
    """
    main = accelerator.is_main_process
    task = make_task(data.task_type, loaded.tokenizer, run.training)
    settings = limit_steps(run.training, run.budget, task, data.train, run.seeds.data)
    validation: Evaluation | None = None
    model, init, originals = initialize(run, data, task, loaded, accelerator.device)
    if main:
        write_json(folder.path / "init.json", init)
        write_json(folder.path / "spectra.json", measures.describe_spectra(model, originals))

    with recording(run, folder, main) as record, training_bar(settings.steps, main) as advance:

        def validate(step: int) -> None:
            nonlocal validation
            if data.validation:
                validation = evaluate(model, task, data.validation, settings, accelerator)
                record({"step": step, "split": "validation", **validation.metrics})

        if settings.validate_at_start:
            validate(0)
        summary = train(
            model,
            task,
            data.train,
            settings,
            seed=run.seeds.data,
            accelerator=accelerator,
            record=record,
            validate=validate,
            observe=measures.update_observer(
                model, originals, run.measures, settings.steps, record
            ),
            advance=advance,
        )
        test = evaluate(model, task, data.test, settings, accelerator) if run.read_test else None
        if test is not None:
            record({"step": summary.steps, "split": "test", **test.metrics})

    if not settings.validate_at_end:
        validation = None  # of an earlier step: not of the model that is saved
    held_out = {**validation_fields(task, validation), **test_fields(task, data, test)}
    result = describe_result(run, folder, data, task, loaded, init, summary, held_out)
    result |= {
        "start": measures.describe_start(model, originals.norms, init, summary.gradient_norms),
        "budget": {
            "trainable_parameters": model.plan.parameters,
            "steps": summary.steps,
            "tokens": summary.tokens,
        },
        "control": control_of(run),
    }
    if main:
        if settings.save_adapter:
            model.save_pretrained(folder.path / "adapter")
        if test is not None:
            write_predictions(folder, test)
        original = measures.OriginalModel(model, lambda: base_again(run, data, accelerator.device))
        end = measures.measure_end(
            original,
            originals,
            run.measures,
            task_type=data.task_type,
            task=task,
            held_out=data.validation,
            batch_size=settings.eval_batch_size,
        )
        write_json(folder.path / "end.json", end)
        result["end"] = {key: value for key, value in end.items() if key != "layers"}
        result["wall_seconds"] = time.perf_counter() - started
        write_json(folder.result_file, result)
        say(
            f"  {outcome(result)}, init {result['init_seconds']:.1f} s, "
            f"training {result['train_seconds']:.1f} s -> {folder.path}"
        )
    accelerator.wait_for_everyone()
    return result


def describe_result(
    run: RunConfig,
    folder: RunFolder,
    data: Splits,
    task: Task,
    loaded: LoadedModel,
    init: dict[str, Any],
    summary: TrainingSummary,
    held_out: dict[str, Any],
) -> dict[str, Any]:
    """Everything that a comparison needs of this run."""
    return {
        "run_id": folder.id,
        "folder": str(folder.path),
        "method": run.init.name,
        "init": asdict(run.init),
        "model": run.model.name,
        "data": run.data.name,
        "data_fingerprint": data.fingerprint,
        "seed": run.seed,
        "seeds": asdict(run.seeds),
        "status": "finished",
        "metric": task.metric,
        **held_out,
        "output_gap": init["output_gap"],
        "init_seconds": init["seconds"]["total"],
        "calibration_seconds": init["seconds"]["calibration"],
        "peak_memory_bytes": init["peak_memory_bytes"],
        "train_seconds": summary.seconds,
        "train_tokens": summary.tokens,
        "first_step_gradient_norm": summary.gradient_norms["total"],
        "first_step_gradient_norms": summary.gradient_norms,
        "trainable_parameters": init["trainable_parameters"],
        "total_parameters": init["total_parameters"],
        "steps": summary.steps,
        "learning_rate": run.training.learning_rate,
        "rank": run.lora.r,
        "notes": [*loaded.notes, *data.notes],
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": describe_environment(),
        "config": asdict(run),
    }


def outcome(result: dict[str, Any]) -> str:
    """The result in a few words."""
    if result["tested"]:
        return f"{result['metric']} {result['score']:.4f}"
    return f"validation {result['metric']} {result['validation_score']:.4f}, test set unread"
