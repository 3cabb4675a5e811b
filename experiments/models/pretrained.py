"""Loads a checkpoint: dropout as configured, and a new head drawn from its own seed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers

from ..errors import ConfigurationError
from .quantization import loading_arguments
from .source import Checkpoint

DECODERS = ("CausalLM", "LMHeadModel", "ConditionalGeneration")


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide progress bars and the loading report, which `newly_drawn` replaces."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    logger = logging.getLogger("transformers.modeling_utils")
    transformers.utils.logging.disable_progress_bar()
    logger.addFilter(is_not_report)
    try:
        yield
    finally:
        logger.removeFilter(is_not_report)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def is_not_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def newly_drawn(model: torch.nn.Module, missing: Iterable[str]) -> tuple[str, ...]:
    """A note on weights below the head that the checkpoint lacks. A new head is expected."""
    body = sorted(key for key in missing if key.startswith(f"{model.base_model_prefix}."))
    if not body:
        return ()
    return (f"random, not pretrained, since the checkpoint lacks them: {', '.join(body)}",)


def load_checkpoint(
    checkpoint: Checkpoint,
    *,
    name: str,
    task_type: str,
    labels: tuple[str, ...],
    dropout: float | None,
    quantization: str | None,
    dtype: str,
    head_seed: int,
) -> tuple[torch.nn.Module, Any, tuple[str, ...]]:
    """Load `checkpoint` for a task: the model, its tokenizer, and notes on it.

    What the checkpoint lacks, such as a head, is drawn from `head_seed`: it is the same for every
    method. The global generator is restored.
    """
    common = {"revision": checkpoint.revision, "trust_remote_code": checkpoint.trust_remote_code}
    # fork_rng also restores the CUDA generators.
    with readable_errors(name, checkpoint), quiet_loading(), torch.random.fork_rng():
        config = transformers.AutoConfig.from_pretrained(checkpoint.source, **common)
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.source, **common)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if dropout is not None:
            set_dropout(config, dropout)
        torch.manual_seed(head_seed)
        if task_type == "SEQ_CLS":
            config.num_labels = len(labels)
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: number for number, label in enumerate(labels)}
            if getattr(config, "pad_token_id", None) is None:
                config.pad_token_id = tokenizer.pad_token_id  # finds the last token
            auto = transformers.AutoModelForSequenceClassification
        else:
            refuse_encoder(config, name)
            auto = transformers.AutoModelForCausalLM
        model, report = auto.from_pretrained(
            checkpoint.source,
            config=config,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            **common,
            **loading_arguments(quantization, task_type, dtype),
        )
    notes = newly_drawn(model, report["missing_keys"])
    for note in notes:
        logging.getLogger(__name__).warning("model=%s: %s", name, note)
    return model, tokenizer, checkpoint.notes + notes


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Keep only the inputs of each block, and recompute the rest in the backward pass.

    Raises:
        ConfigurationError: transformers does not support it for this model.
    """
    try:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:  # its name before transformers 5.15
            model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigurationError(
            f"runtime.gradient_checkpointing=true: {error}; set it to false"
        ) from error
    # transformers warns if this cache is on while blocks are recomputed. Generation turns it on.
    model.config.use_cache = False


def set_dropout(config: Any, rate: float) -> None:
    """Set every dropout rate in a transformers configuration, whatever its name."""
    for key, value in config.to_dict().items():
        is_rate = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        if is_rate and ("dropout" in key or key.endswith("_pdrop")):
            setattr(config, key, rate)


def refuse_encoder(config: Any, name: str) -> None:
    """Refuse an encoder, which would load as a language model with a random head."""
    architectures = config.architectures or []
    if architectures and not any(kind in known for known in architectures for kind in DECODERS):
        raise ConfigurationError(
            f"model={name} is {', '.join(architectures)}, which does not generate text, and the "
            "data are prompts with completions; use model=smollm2 or another causal model, or data "
            "with labels"
        )


@contextlib.contextmanager
def readable_errors(name: str, checkpoint: Checkpoint) -> Iterator[None]:
    """Name the setting if transformers cannot load the checkpoint."""
    try:
        yield
    except ConfigurationError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"model={name}: transformers cannot load {checkpoint.source!r}: "
            f"{str(error).strip().splitlines()[0]} (give a folder that holds config.json, weights "
            "and tokenizer, or the name of a model on the hub)"
        ) from error
