"""`lora-init make`: write the adapter of a start, and with --residual also the changed base."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

from lora_init import get_peft_model
from lora_init.cli.adapter_arguments import adapter_config, method_of, positive
from lora_init.cli.checkpoints import (
    checkpoint_folder,
    full_name,
    is_quantized,
    loaded,
    skeleton,
    task_type,
    tokenizer,
)
from lora_init.cli.output import check_folder, emit
from lora_init.cli.residual import DTYPES, RESIDUAL_FOLDER, write_residual
from lora_init.cli.text_data import batches
from lora_init.config.file import CONFIG_NAME
from lora_init.files import write_atomically
from lora_init.linalg.precision import device_for
from lora_init.plan.tables import render
from lora_init.registry import Initializer

SINGLE = "data"
RECORD = "lora_init_make.json"
"""A file in an unfinished folder: the arguments, so that only the same command continues it."""


def add_make_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[SET=]FILE",
        help=".jsonl, .csv or .txt, for eva and the like; once for each set of a method that "
        "compares sets, such as learn=a.jsonl and keep=b.jsonl",
    )
    parser.add_argument(
        "--target-weights",
        metavar="FOLDER",
        help="second checkpoint, or an adapter on MODEL, for from_delta",
    )
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument(
        "--examples", type=positive, default=256, help="rows of --data (default: 256)"
    )
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--max-length", type=positive, default=512, help="tokens of a row")
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
    spec, options = method_of(arguments.method, "--method ")
    out = Path(arguments.out)
    request = spec.request(options)
    files = data_files(arguments, request.sets if request else None)
    _check(arguments, spec, out)
    folder = checkpoint_folder(arguments.model)
    quantized = is_quantized(folder)
    if quantized and arguments.residual:
        raise ValueError(
            f"--residual is not supported with MODEL={str(folder)!r}, a quantized checkpoint: its "
            "weights are not written. Leave it out, or pass the unquantized checkpoint"
        )
    whole = partial(loaded, folder, _device(arguments), arguments.offload)
    frame = whole() if quantized else skeleton(folder)
    config = adapter_config(arguments, frame, full_name(arguments.model))
    calibration, original_weights, model = None, None if quantized else folder, frame
    if spec.needs_data:
        found = {
            name: _batches(arguments, Path(path), folder, frame) for name, path in files.items()
        }
        calibration = found.get(SINGLE, found)
    second = arguments.target_weights
    # An adapter is read with its base; a checkpoint is read one layer at a time.
    adapter = second is not None and (Path(second) / CONFIG_NAME).is_file()
    new_head = config.task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
    if not quantized and (spec.needs_data or adapter or new_head):
        model, original_weights = whole(), None
    start = time.perf_counter()
    adapted = get_peft_model(
        model,
        config,
        calibration=calibration,
        original_weights=original_weights,
        target_weights=arguments.target_weights,
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


def data_files(arguments: Namespace, sets: tuple[str, ...] | None) -> dict[str, str]:
    """The file of each calibration set; one file without a set has the name `SINGLE`.

    Args:
        sets: the sets that the method compares, empty for a method of one set; None for a method
            that reads no data.

    Raises:
        ValueError: the files are not those of the method.
    """
    method, given = f"--method {arguments.method}", arguments.data
    if sets is None:
        if given:
            raise ValueError(
                f"--data is not supported with {method}, which reads no data: leave it out"
            )
        return {}
    if not given:
        wanted = " ".join(f"--data {name}=FILE" for name in sets) or "--data FILE"
        raise ValueError(f"{method} reads data: pass {wanted} with texts (.jsonl, .csv or .txt)")
    if not sets:
        if len(given) > 1:
            raise ValueError(
                f"--data {' --data '.join(given)} is not supported with {method}: must be one file"
            )
        return {SINGLE: given[0]}
    found = dict(text.partition("=")[::2] for text in given)
    if sorted(found) != sorted(sets) or len(given) != len(sets) or not all(found.values()):
        raise ValueError(
            f"--data {' --data '.join(given)} is not supported with {method}: must be one file for "
            f"each set, {' '.join(f'--data {name}=FILE' for name in sets)}"
        )
    return found


def _check(arguments: Namespace, spec: Initializer, out: Path) -> None:
    base = spec.base
    if "target_weight" in spec.reads and arguments.target_weights is None:
        raise ValueError(
            f"--method {arguments.method} reads a second weight: pass --target-weights FOLDER, a "
            "checkpoint or an adapter"
        )
    if "target_weight" not in spec.reads and arguments.target_weights is not None:
        raise ValueError(
            f"--target-weights is not supported with --method {arguments.method}, which reads no "
            "second weight: leave it out"
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
    if (out / RECORD).is_file():
        recorded = json.loads((out / RECORD).read_text())
        if recorded != _record(arguments):
            raise ValueError(
                f"OUT={str(out)!r} contains an unfinished adapter of another command: repeat "
                "that command, or pass an empty folder"
            )
    else:
        check_folder(out)


def _begin(out: Path, arguments: Namespace) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_record(arguments), indent=2)
    write_atomically(out / RECORD, lambda path: path.write_text(text))


def _record(arguments: Namespace) -> dict[str, Any]:
    """The arguments that decide the result."""
    values = {k: v for k, v in vars(arguments).items() if k not in ("json", "run", "command")}
    return json.loads(json.dumps(values | {"model": full_name(arguments.model)}, default=str))


def _device(arguments: Namespace) -> str:
    place = device_for(None if arguments.device == "cpu" else arguments.device)
    return "cpu" if place is None else str(place)


def _batches(arguments: Namespace, path: Path, folder: Path, model: Any) -> list[dict[str, Any]]:
    task = task_type(model)
    ids = model.config.label2id if task == "SEQ_CLS" else None
    return batches(
        path,
        tokenizer(folder),
        text_column=arguments.text_column,
        label_column=arguments.label_column,
        label_ids=ids,
        language_model=task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"),
        examples=arguments.examples,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
    )
