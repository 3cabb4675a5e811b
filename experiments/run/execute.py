"""One run from configuration to result: data, model, initialization, training, test."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .. import measures
from ..config.run_config import RunConfig, control_of
from ..console import say, training_bar
from ..data import Splits, load_data
from ..errors import DamagedFile
from ..models import LoadedModel, checkpoint_activations, load_model
from ..tasks import Evaluation, Task, make_task
from ..training.evaluate import evaluate
from ..training.loop import TrainingSummary, make_accelerator, refuse_divergence, train
from .budget import limit_steps
from .environment import describe_environment
from .failures import record_failure, refuse_to_diverge_again
from .files import kind_of, write_json
from .folder import RunFolder, identify
from .held_out import (
    outcome,
    read_test_set,
    refuse_unscorable,
    test_fields,
    validation_fields,
    write_predictions,
)
from .lock import Claim, claim
from .metrics import recording
from .outputs import open_outputs
from .resume import (
    make_checkpoints,
    prepare_folder,
    read_first_start,
    restarted,
    restore_adapter,
    say_damage,
)
from .start import initialize, load_base


def execute(run: RunConfig, *, wait: bool = False) -> dict[str, Any]:
    """Do the run, continue it, or skip it if it has finished.

    Args:
        wait: if another process works on the same run, wait for its result.

    Returns:
        The content of `result.json`.

    Raises:
        ConfigurationError: a setting cannot work.
        RunFailed: training diverged or its time is over; `failed.json` has the reason.
        RunElsewhere: another process works on the run, and `wait` is False.
    """
    folder = identify(run)
    if (done := already_finished(run, folder)) is not None:
        return done
    open_outputs(Path(run.paths.outputs), folder.path.parent, folder.path)
    if run.runtime.threads is not None:
        torch.set_num_threads(run.runtime.threads)
    accelerator = make_accelerator(run.training, run.runtime.device)
    with claim(folder, run.training.steps, accelerator, wait=wait) as claimed:
        if (done := already_finished(run, folder)) is not None:
            return done  # by the process that held the lock before
        if not run.runtime.rerun and (untested := folder.finished()) is not None:
            try:
                return read_test_set(run, folder, untested, accelerator)
            except DamagedFile as damage:
                say_damage(damage)
        if not run.runtime.rerun:
            refuse_to_diverge_again(folder)
        try:
            return restarted(folder, lambda: carry_out(run, folder, accelerator, claimed))
        except Exception as error:
            if accelerator.is_main_process:
                record_failure(folder, error)
            raise
        finally:
            accelerator.free_memory()


def already_finished(run: RunConfig, folder: RunFolder) -> dict[str, Any] | None:
    """The result of a run that is complete, including its test if one is asked for."""
    done = None if run.runtime.rerun else folder.finished()
    if done is None or (run.read_test and not done["tested"]):
        return None
    if kind_of(folder.path) == "a folder":
        folder.forget_checkpoint()  # a process may have been killed right after its result
    say(f"  finished before, skipped: {folder.path} ({outcome(done)})")
    return done


def carry_out(
    run: RunConfig, folder: RunFolder, accelerator: Accelerator, claimed: Claim
) -> dict[str, Any]:
    """Load, initialize, train, test and write, in that order; `result.json` last."""
    started = time.monotonic()
    main = accelerator.is_main_process
    runtime = run.runtime
    data = load_data(run.data)
    refuse_unscorable(run, data)
    loaded = load_model(
        run.model, task_type=data.task_type, labels=data.labels, head_seed=run.seeds.head
    )
    if runtime.gradient_checkpointing:
        checkpoint_activations(loaded.model)
    saved = prepare_folder(run, folder, claimed, main)
    accelerator.wait_for_everyone()
    task = make_task(data.task_type, loaded.tokenizer, run.training, data.judge)
    settings = limit_steps(run.training, run.budget, task, data.train, run.seeds.data)
    validation: Evaluation | None = None
    model, init, originals = initialize(run, data, task, loaded, accelerator.device)
    saved = restore_adapter(saved, model)
    if saved is not None:
        init = read_first_start(folder)
    elif main:
        write_json(folder.init_file, init)
        write_json(folder.spectra_file, measures.describe_spectra(model, originals))

    keep = saved.metrics_size if saved else 0
    with (
        recording(run, folder, main, keep) as (record, metrics_size),
        training_bar(settings.steps, main) as show,
    ):

        def validate(step: int) -> None:
            nonlocal validation
            if data.validation:
                validation = evaluate(model, task, data.validation, settings, accelerator)
                record({"step": step, "split": "validation", **validation.metrics})
                loss = validation.metrics["loss"]
                refuse_divergence("the validation loss", loss, step, settings)

        def advance(step: int, loss: float) -> None:
            claimed.reached(step, settings.steps)
            show(step, loss)

        if settings.validate_at_start and saved is None:
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
            checkpoints=make_checkpoints(run, folder, saved, metrics_size, started),
            micro_batch_size=runtime.micro_batch_size,
        )
        test = evaluate(model, task, data.test, settings, accelerator) if run.read_test else None
        if test is not None:
            record({"step": summary.steps, "split": "test", **test.metrics})
            refuse_divergence("the test loss", test.metrics["loss"], summary.steps, settings)
        if not settings.validate_at_end:
            validation = None  # of an earlier step, not of the model that is saved
        elif validation is None and data.validation:  # continued after its last step
            validation = evaluate(model, task, data.validation, settings, accelerator)
            loss = validation.metrics["loss"]
            refuse_divergence("the validation loss", loss, summary.steps, settings)

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
        end = measures.measure_end(
            measures.OriginalModel(model, lambda: load_base(run, data, accelerator.device)),
            originals,
            run.measures,
            task_type=data.task_type,
            task=task,
            held_out=data.validation,
            batch_size=settings.eval_batch_size,
        )
        write_json(folder.path / "end.json", end)
        result["end"] = {key: value for key, value in end.items() if key != "layers"}
        result["wall_seconds"] = time.monotonic() - started
        write_json(folder.result_file, result)
        folder.forget_checkpoint()
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
    """Everything that a comparison needs from this run."""
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
