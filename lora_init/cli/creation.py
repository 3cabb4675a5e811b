"""`lora-init make`: write the adapter of a start, and with --residual also the changed base."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

from lora_init import get_peft_model
from lora_init.api import device_for
from lora_init.cli.adapter_arguments import absolute, adapter_config
from lora_init.cli.checkpoints import (
    checkpoint_folder,
    is_quantized,
    loaded,
    skeleton,
    task_type,
    tokenizer,
)
from lora_init.cli.output import emit
from lora_init.cli.residual import DTYPES, RESIDUAL_FOLDER, write_residual
from lora_init.cli.text_data import batches
from lora_init.config.file import CONFIG_NAME
from lora_init.files import write_atomically
from lora_init.registry import resolve
from lora_init.tables import render

RECORD = "lora_init_make.json"
"""A file in an unfinished folder: the arguments, so that only the same command continues it."""


def add_make_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--data", metavar="FILE", help=".jsonl, .csv or .txt, for eva and the like")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--examples", type=int, default=256, help="rows of --data (default: 256)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")
    parser.add_argument(
        "--offload", metavar="FOLDER", help="with --data: offload weights that do not fit in memory"
    )
    parser.add_argument(
        "--portable", action="store_true", help="scaling 1 and one rank, for vLLM and llama.cpp"
    )
    parser.add_argument(
        "--residual",
        action="store_true",
        help="write an adapter of rank r and its base in OUT/base, instead of rank 2r",
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="dtype of the residual base (default: as stored)"
    )


def make_adapter(arguments: Namespace) -> None:
    """Initialize the adapter of a model, and write it in the format of PEFT.

    Methods that read only weights read one layer at a time, so the model may be larger than memory.

    Raises:
        ValueError, FileNotFoundError: an argument is not supported. Nothing is written then.
    """
    spec, _ = resolve(arguments.method)
    out = Path(arguments.out)
    _check(arguments, spec.base, spec.needs_data, out)
    folder = checkpoint_folder(arguments.model)
    quantized = is_quantized(folder)
    if quantized and arguments.residual:
        raise ValueError(
            f"--residual is not supported with MODEL={str(folder)!r}, a quantized checkpoint: its "
            "weights are not written. Leave it out, or pass the unquantized checkpoint"
        )
    whole = partial(loaded, folder, _device(arguments), arguments.offload)
    frame = whole() if quantized else skeleton(folder)
    config = adapter_config(arguments, frame, absolute(arguments.model))
    calibration, original_weights, model = None, None if quantized else folder, frame
    if spec.needs_data:
        calibration = _batches(arguments, folder, frame)
    new_head = config.task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
    if not quantized and (spec.needs_data or new_head):
        model, original_weights = whole(), None
    start = time.perf_counter()
    adapted = get_peft_model(
        model,
        config,
        calibration=calibration,
        original_weights=original_weights,
        device=None if arguments.device == "cpu" else arguments.device,
        seed=arguments.seed,
    )
    seconds = time.perf_counter() - start
    _begin(out, arguments)
    data: dict[str, Any] = {"path": str(out), "method": spec.name, "seconds": seconds}
    text = f"{out}: {spec.name}, {len(adapted.plan.targets)} layers, initialized in {seconds:.1f} s"
    if arguments.residual:
        errors = write_residual(out, folder, adapted, config, arguments.dtype)
        data |= {"base": str(out / RESIDUAL_FOLDER), "rounding_errors": errors}
        rows = [["largest", max(errors.values())], ["mean", sum(errors.values()) / len(errors)]]
        table = render(["rounding error of the residual base, relative to W", ""], rows)
        text = f"{table}\n{text}; load {out / RESIDUAL_FOLDER} and this adapter of rank {config.r}"
    else:
        adapted.save_pretrained(out, portable=arguments.portable)
    (out / RECORD).unlink()
    emit(arguments, data, text)


def _check(arguments: Namespace, base: str, needs_data: bool, out: Path) -> None:
    if needs_data and arguments.data is None:
        raise ValueError(
            f"--method {arguments.method} reads data: pass --data FILE with texts (.jsonl, .csv or "
            ".txt)"
        )
    if not needs_data and arguments.data is not None:
        raise ValueError(
            f"--data is not supported with --method {arguments.method}, which reads no data: leave "
            "it out"
        )
    if arguments.residual and base == "keep":
        raise ValueError(
            f"--residual is not supported with --method {arguments.method}, which keeps the base: "
            "leave it out"
        )
    if arguments.residual and arguments.portable:
        raise ValueError(
            "--portable is not supported with --residual: leave one of them out (the adapter of a "
            "residual base has one scaling in all loaders already, unless it uses --use-rslora)"
        )
    if arguments.dtype is not None and not arguments.residual:
        raise ValueError(
            "--dtype is the dtype of a residual base: pass --residual, or leave it out"
        )
    if base == "replace" and not arguments.residual:
        raise ValueError(
            f"--method {arguments.method} replaces the base by a quantized one, which other "
            "loaders cannot compute: pass --residual to write that base too"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT={str(out)!r} is a file: must be a folder")
    if out.is_dir() and any(out.iterdir()):
        if (out / RECORD).is_file():
            recorded = json.loads((out / RECORD).read_text())
            if recorded != _record(arguments):
                raise ValueError(
                    f"OUT={str(out)!r} contains an unfinished adapter of another command: repeat "
                    "that command, or pass an empty folder"
                )
        else:
            what = "an adapter" if (out / CONFIG_NAME).is_file() else "other files"
            raise ValueError(f"OUT={str(out)!r} contains {what}: must be empty or a new folder")


def _begin(out: Path, arguments: Namespace) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_record(arguments), indent=2)
    write_atomically(out / RECORD, lambda path: path.write_text(text))


def _record(arguments: Namespace) -> dict[str, Any]:
    """The arguments that decide the result."""
    values = {k: v for k, v in vars(arguments).items() if k not in ("json", "run", "command")}
    return json.loads(json.dumps(values | {"model": absolute(arguments.model)}, default=str))


def _device(arguments: Namespace) -> str:
    place = device_for(None if arguments.device == "cpu" else arguments.device)
    return "cpu" if place is None else str(place)


def _batches(arguments: Namespace, folder: Path, model: Any) -> list[dict[str, Any]]:
    task = task_type(model)
    ids = model.config.label2id if task == "SEQ_CLS" else None
    return batches(
        Path(arguments.data),
        tokenizer(folder),
        text_column=arguments.text_column,
        label_column=arguments.label_column,
        label_ids=ids,
        language_model=task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"),
        examples=arguments.examples,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
    )
