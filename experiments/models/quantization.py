"""Quantized base models: the formats of bitsandbytes, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_init.config.lora_config import HEADS

from ..config.bounds import refusal
from ..errors import ConfigurationError, nearest
from .source import Checkpoint

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip


def check_format(quantization: str | None) -> None:
    if quantization is not None and quantization not in FORMATS:
        hint = nearest(quantization, FORMATS).strip()
        must_be = f"null or one of {', '.join(FORMATS)}"
        raise refusal("model.quantization", quantization, must_be, hint.removesuffix("?"))


def loading_arguments(
    quantization: str | None, task_type: str, dtype: str = "float32"
) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a format; the head is not quantized."""
    if quantization is None:
        return {}
    try:
        import bitsandbytes  # noqa: F401  (transformers' own message names no setting)
    except ImportError as error:
        raise ConfigurationError(
            f"model.quantization={quantization!r} needs bitsandbytes; `pip install bitsandbytes`, "
            "or set model.quantization=null"
        ) from error
    from transformers import BitsAndBytesConfig

    skipped = ["lm_head", *HEADS.get(task_type, [])]
    chosen = FORMATS[quantization]
    if "load_in_4bit" in chosen:
        chosen = {**chosen, "bnb_4bit_compute_dtype": dtype}
    settings = BitsAndBytesConfig(**chosen, llm_int8_skip_modules=skipped)
    return {"quantization_config": settings, "device_map": "auto"}


def original_folder(checkpoint: Checkpoint) -> str:
    """The folder of the unquantized checkpoint, for methods that read its weights."""
    if Path(checkpoint.source).is_dir():
        return checkpoint.source
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json"]
    return snapshot_download(
        checkpoint.source, revision=checkpoint.revision, allow_patterns=patterns
    )
