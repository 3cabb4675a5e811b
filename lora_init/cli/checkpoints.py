"""Models by folder or hub name: their checkpoint, a skeleton on the meta device, or the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_init.cli.applications import application

FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
"""The files of a model on the hub that are downloaded: weights, configuration, tokenizer."""

PACKAGED = ("minilm", "smollm2")
"""Short names of models that Python packages ship. A folder of that name comes first."""

MXFP4 = "mxfp4"
"""The name of gpt-oss's quantization in a configuration."""

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""PEFT's task type by the ending of transformers' class name."""


def full_name(model: str) -> str:
    """The name of a model for `adapter_config.json`: a hub name, or an absolute path.

    Raises:
        ValueError: `model` is a short name, and its package is not installed.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path.resolve())
    return application("models").packaged_folder(model) if model in PACKAGED else model


def checkpoint_folder(model: str) -> Path:
    """The folder of a checkpoint: a folder, a packaged model, or the download of a hub name.

    Raises:
        FileNotFoundError: `model` is neither a folder nor a name on the hub.
        ValueError: `model` is a short name, and its package is not installed.
    """
    path = Path(full_name(model))
    if path.is_dir():
        return path
    hub = _library("huggingface_hub")
    if path.is_absolute() or model.count("/") > 1 or model.startswith("."):
        raise FileNotFoundError(f"MODEL={model!r}: no such folder")
    try:
        return Path(hub.snapshot_download(model, allow_patterns=FILES))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"MODEL={model!r} is neither a folder here nor a model that the hub returned "
            f"({type(error).__name__}): must be the folder of a transformers model, a hub name, or "
            f"one of {', '.join(PACKAGED)}"
        ) from error


def is_quantized(folder: Path) -> bool:
    """Whether a quantizer's package makes the modules of the checkpoint while loading it.

    MXFP4 does not count: its experts are read and loaded as dequantized values.
    """
    return _quantization(folder) not in (None, MXFP4)


def _quantization(folder: Path) -> str | None:
    """The name of the quantization in the configuration of a checkpoint."""
    found = getattr(_config(folder)[0], "quantization_config", None)
    if found is None:
        return None
    values = found if isinstance(found, dict) else found.to_dict()
    return values.get("quant_method", "unknown")


def skeleton(folder: Path) -> nn.Module:
    """The model of an unquantized checkpoint without weights, on the meta device.

    It takes seconds for any size.

    Raises:
        ValueError: transformers does not know the class.
    """
    config, model_class = _config(folder)
    with torch.device("meta"):
        model = model_class(config)
    stored = getattr(config, "dtype", None)
    return model.to(stored if isinstance(stored, torch.dtype) else torch.float32).eval()


def loaded(folder: Path, device: str, offload: str | None) -> nn.Module:
    """The model with its weights in their stored dtype or quantized, for forward passes.

    Args:
        folder: the checkpoint.
        device: where to put the model.
        offload: a folder for the weights that do not fit in memory; needs accelerate.
    """
    _, model_class = _config(folder)
    settings: dict[str, Any] = {"dtype": "auto"}
    if _quantization(folder) == MXFP4:
        settings["quantization_config"] = _library("transformers").Mxfp4Config(dequantize=True)
    if offload is not None:
        return model_class.from_pretrained(
            folder, device_map="auto", offload_folder=offload, **settings
        ).eval()
    if is_quantized(folder):
        return model_class.from_pretrained(folder, device_map=device).eval()
    return model_class.from_pretrained(folder, **settings).eval().to(device)


def task_type(model: nn.Module) -> str | None:
    """PEFT's task type of a transformers model; None if the class name states none."""
    name = type(model).__name__
    return next((task for ending, task in TASKS.items() if name.endswith(ending)), None)


def tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint, which can pad.

    Raises:
        ValueError: the folder has no tokenizer.
    """
    transformers = _library("transformers")
    try:
        found = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"MODEL={str(folder)!r} has no tokenizer that transformers can load; --data needs "
            f"one ({error})"
        ) from error
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def _config(folder: Path) -> tuple[Any, Any]:
    """The configuration of a checkpoint, and the class of its model."""
    transformers = _library("transformers")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"MODEL={str(folder)!r} has no config.json: must be the folder of a transformers model"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: transformers cannot read it ({error})") from error
    names = getattr(config, "architectures", None) or []
    model_class = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    if model_class is None:
        raise ValueError(
            f"architectures={names!r} in {path} is not supported: must name a class of "
            f"transformers {transformers.__version__}"
        )
    return config, model_class


def _library(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ValueError(
            f"this command reads models with {name}, which is not installed: pip install {name}"
        ) from error
