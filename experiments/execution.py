"""One run from configuration to result: data, model, initialization, training, test."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from experiments.checkpoints import Checkpoints
from experiments.claims import Claim, claim
from experiments.config import RunConfig
from experiments.console import say, training_bar
from experiments.continuing import already_finished, prepare_folder, restore_adapter
from experiments.data import Splits, load_data
from experiments.environment import describe_environment
from experiments.errors import ConfigurationError
from experiments.evaluation import evaluate
from experiments.failures import record_failure, refuse_to_diverge_again
from experiments.models import LoadedModel, load_model
from experiments.probe import PeakMemory, output_gap, probe
from experiments.recording import recording
from experiments.runs import RunFolder, identify, last_row, write_json
from experiments.tasks import Evaluation, Task, draw, make_task
from experiments.training import TrainingSummary, make_accelerator, train
from lora_init import LoraConfig, LoraModel, get_peft_model

PROBED_EXAMPLES = 16


def execute(run: RunConfig, *, wait: bool = False) -> dict[str, Any]:
    """Do the run, go on with it, or find it done; returns what `result.json` holds.

    Args:
        wait: for a process that works on the same run, and take its result.

    Raises:
        ConfigurationError: a setting that cannot work.
        RunFailed: training diverged or its time is over; `failed.json` in the run's folder says so.
        RunElsewhere: another process works on the run, and `wait` is False.
    """
    folder = identify(run)
    if (done := already_finished(run, folder)) is not None:
        return done
    if run.runtime.threads is not None:
        torch.set_num_threads(run.runtime.threads)
    accelerator = make_accelerator(run.training, run.runtime.device)
    with claim(folder, run.training.steps, accelerator, wait=wait) as claimed:
        if (done := already_finished(run, folder)) is not None:
            return done  # by the process that held it before
        if not run.runtime.rerun:
            refuse_to_diverge_again(folder)
        try:
            return carry_out(run, folder, accelerator, claimed)
        except Exception as error:
            if accelerator.is_main_process:
                record_failure(folder, error)
            raise
        finally:
            accelerator.free_memory()


def carry_out(
    run: RunConfig, folder: RunFolder, accelerator: Accelerator, claimed: Claim
) -> dict[str, Any]:
    """Load, initialize, train, test and write, in that order; `result.json` last."""
    started = time.monotonic()
    main = accelerator.is_main_process
    settings, runtime = run.training, run.runtime
    data = load_data(run.data)
    loaded = load_model(
        run.model, task_type=data.task_type, labels=data.labels, head_seed=run.seeds.head
    )
    saved = prepare_folder(run, folder, claimed, main)
    accelerator.wait_for_everyone()
    task = make_task(data.task_type, loaded.tokenizer, settings)
    model, init = initialize(run, data, task, loaded, accelerator.device)
    saved = restore_adapter(saved, model)
    if saved is not None:
        init = json.loads(folder.init_file.read_text())  # of the first start
    elif main:
        write_json(folder.init_file, init)

    keep = saved.metrics_size if saved else 0
    with (
        recording(run, folder, main, keep) as (record, metrics_size),
        training_bar(settings.steps, main) as show,
    ):

        def validate(step: int) -> None:
            measured = evaluate(model, task, data.validation, settings, accelerator)
            record({"step": step, "split": "validation", **measured.metrics})

        def advance(step: int, loss: float) -> None:
            claimed.reached(step)
            show(step, loss)

        if settings.validate_every and not data.validation:
            raise ConfigurationError(
                "training.validate_every is set, and the validation split is empty; raise "
                "data.validation_limit, or set training.validate_every=0"
            )
        if settings.validate_at_start and saved is None:
            validate(0)
        limit = runtime.time_limit_minutes
        summary = train(
            model,
            task,
            data.train,
            settings,
            seed=run.seeds.data,
            accelerator=accelerator,
            record=record,
            validate=validate,
            advance=advance,
            checkpoints=Checkpoints(
                folder,
                saved,
                every=runtime.checkpoint_every,
                minutes=runtime.checkpoint_minutes,
                deadline=None if limit is None else started + 60.0 * limit,
                metrics_size=metrics_size,
            ),
        )
        test = evaluate(model, task, data.test, settings, accelerator)
        record({"step": summary.steps, "split": "test", **test.metrics})

    result = describe_result(run, folder, data, task, loaded, init, summary, test)
    if main:
        if settings.save_adapter:
            model.save_pretrained(folder.path / "adapter")
        np.savez(
            folder.path / "predictions.npz", id=test.ids, correct=test.correct, score=test.score
        )
        write_json(folder.result_file, result)
        folder.forget_checkpoint()
        say(
            f"  {task.metric} {result['score']:.4f}, init {result['init_seconds']:.1f} s, "
            f"training {result['train_seconds']:.1f} s -> {folder.path}"
        )
    accelerator.wait_for_everyone()
    return result


def initialize(
    run: RunConfig, data: Splits, task: Task, loaded: LoadedModel, device: torch.device
) -> tuple[LoraModel, dict[str, Any]]:
    """Add the adapter; returns the model, and what `init.json` holds."""
    # A quantised model is where it was loaded, and must not be moved.
    model = loaded.model if loaded.original_weights else loaded.model.to(device)
    batch = task.collate(data.train[:PROBED_EXAMPLES])
    mask = task.probed(batch)
    before = probe(model, batch, mask)
    with PeakMemory() as memory:
        try:
            config = LoraConfig(
                **asdict(run.lora), task_type=data.task_type, init_lora_weights=asdict(run.init)
            )
            # Made for methods that calibrate only; a list, whose statistics the cache can keep.
            calibrates = config.initializer()[0].calibration is not None
            batches = list(calibration_batches(run, data, task, device)) if calibrates else None
            replaces = config.initializer()[0].base == "replace"
            adapted = get_peft_model(
                model,
                config,
                calibration=batches,
                seed=run.seeds.init,
                original_weights=loaded.original_weights if replaces else None,
                cache=run.runtime.cache,
            )
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigurationError(f"init={run.init.name}: {error}") from error
    trainable, total = adapted.get_nb_trainable_parameters()
    return adapted, {
        **adapted.init_report().to_dict(),
        "peak_memory_bytes": memory.bytes,
        "peak_memory_kind": memory.kind,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "output_gap": output_gap(before, probe(adapted, batch, mask)),
    }


def calibration_batches(
    run: RunConfig, data: Splits, task: Task, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Training examples drawn by `seeds.calibration`, one batch at a time."""
    settings = run.calibration
    chosen = draw(len(data.train), settings.samples, run.seeds.calibration)
    for start in range(0, len(chosen), settings.batch_size):
        some = [data.train[index] for index in chosen[start : start + settings.batch_size]]
        yield {key: value.to(device) for key, value in task.collate(some).items()}


def describe_result(
    run: RunConfig,
    folder: RunFolder,
    data: Splits,
    task: Task,
    loaded: LoadedModel,
    init: dict[str, Any],
    summary: TrainingSummary,
    test: Evaluation,
) -> dict[str, Any]:
    """Everything that a comparison needs of this run."""
    validation = last_row(folder.metrics_file, "validation")
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
        "score": test.metrics[task.metric],
        "n_test": len(test.ids),
        "majority": task.majority(data.test),
        "loss_test": test.metrics["loss"],
        "test": test.metrics,
        "validation": validation,
        "validation_score": validation and validation[task.metric],
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
