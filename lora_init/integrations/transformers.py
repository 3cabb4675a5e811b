"""A callback that initializes a PEFT model at the start of a training by transformers or TRL.

    trainer = Trainer(peft_model, …, callbacks=[LoraInitCallback("eva", calibration="train")])
    trainer.train()

It also serves trainers that subclass transformers' `Trainer`: TRL's SFTTrainer, DPOTrainer and
GRPOTrainer, sentence-transformers, LLaMA-Factory and axolotl.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lora_init import Calibration, InitReport, initialize_peft_model
from lora_init.distributed import rank_count, rank_number
from lora_init.peft_models.plan import method_setting
from lora_init.peft_models.resume import (
    Expected,
    has_all_factors,
    is_doubled_in_shards,
    refuse_lost_adapter,
    stop_waiting,
    wait,
)
from lora_init.peft_models.start import base_owner, records
from lora_init.registry import describe, resolve


class LoraInitCallback(TrainerCallback):
    """Initialize the LoRA layers of the trainer's PEFT model when the training starts.

    The factors are those of `initialize_peft_model`. The optimizer exists by then, so every
    parameter stays the same object and keeps its shape: a method that chooses ranks keeps the
    configured ones (EVA's `rho` is 1).

    A resumed training is never initialized again: the checkpoint's start is restored when Trainer
    loads it. Under DistributedDataParallel and FSDP2 each process reads its part of the calibration
    examples, and all get the same factors. Under FSDP2, resume with the method of the interrupted
    training: it says whether the checkpoint has factors of rank 2r.

    Args:
        method: as of `initialize_peft_model`: a name, a mapping or an options object.
        calibration: "train" for examples of the trainer's own training set; or batches, or the
            result of `lora_init.calibrate`. Methods without calibration ignore it.
        batches: how many batches of the trainer's size to read with "train", over all processes.
        seed: the seed of the initialization, and of the choice of the examples.
        settings: the other arguments of `initialize_peft_model`.

    Attributes:
        report: the `InitReport`; None before the start, and after a resume.

    Raises:
        ValueError: a setting is not supported; at the start of the training, a model that is no
            PEFT model, or that FSDP1 or DeepSpeed ZeRO-3 has sharded. Under FSDP2 also
            `load_best_model_at_end` with full state dicts and a method that subtracts from the
            base; and `activation_checkpointing` of FSDP, with which PEFT's files are empty.
        TypeError: a setting has another type.
    """

    def __init__(
        self,
        method: Any,
        *,
        calibration: str | Iterable[Any] | Calibration | None = "train",
        batches: int = 32,
        options: Any = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if isinstance(calibration, str) and calibration != "train":
            raise ValueError(
                f"calibration={calibration!r} is not supported: must be 'train', batches, or the "
                "result of lora_init.calibrate"
            )
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            raise ValueError(f"batches={batches!r} is not supported: must be an integer >= 1")
        _check_names(settings)
        self.method = _with_fixed_ranks(method_setting(method, options))
        self.calibration = calibration
        self.batches = batches
        self.seed = seed
        self.settings = settings
        self.report: InitReport | None = None

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Prepare the model for a resume: its checkpoint may contain a start."""
        if hasattr(model, "peft_config") and hasattr(model, "load_adapter"):
            adapter = self.settings.get("adapter_name", "default")
            quantized_base = self.settings.get("quantized_base", "in_forward")
            wait(model, Expected(self.method, self._subtracts, adapter, quantized_base))

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Initialize the model, unless the training is resumed or the model has a start."""
        stop_waiting(model)
        refuse_lost_adapter(model, self.settings.get("adapter_name", "default"))
        is_started = state.global_step > 0 or bool(records(model))
        if is_doubled_in_shards(model, not is_started and self._subtracts):
            _refuse_best_model(args)
        if is_started:
            return
        self.report = initialize_peft_model(
            model,
            self.method,
            calibration=self._calibration(model, train_dataloader),
            seed=self.seed,
            **self.settings,
        )

    def on_save(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Remove `pytorch_model_fsdp.bin` from a checkpoint if torch cannot load it.

        Under FSDP2 with `FULL_STATE_DICT`, Trainer writes the adapter to this file and to PEFT's.
        torch copies factors of rank 2r from it into shards of rank r, before any hook runs, and
        fails. Without this file, Trainer resumes from PEFT's.
        """
        owner = base_owner(model)
        if owner is None or not is_doubled_in_shards(model) or rank_count() == 1:
            return
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        peft_folder = folder if owner == "default" else folder / owner
        full_state = folder / "pytorch_model_fsdp.bin"
        if not state.is_world_process_zero or not full_state.is_file():
            return
        if has_all_factors(model, peft_folder, owner):
            full_state.unlink()
        else:
            warnings.warn(
                f"Trainer cannot resume from {str(folder)!r}: torch cannot load factors of rank 2r "
                "from pytorch_model_fsdp.bin, and PEFT's file is missing. Set state_dict_type in "
                "fsdp_config to SHARDED_STATE_DICT",
                stacklevel=2,
            )

    @property
    def _subtracts(self) -> bool:
        spec, _ = resolve(self.method)
        return spec.base == "subtract"

    def _calibration(self, model: nn.Module, loader: Any) -> Any:
        spec, _ = resolve(self.method)
        if not spec.needs_data:
            return None
        if not isinstance(self.calibration, str):
            return self.calibration
        device = next(model.parameters()).device
        with _same_random_numbers():
            examples = _examples(loader, self.batches, self.seed)
            batches = [_moved(batch, device) for batch in examples]
        if batches and not isinstance(batches[0], Mapping):
            raise ValueError(
                "calibration='train' is not supported: a batch of this trainer must be a mapping "
                f"of tensors, and is a {type(batches[0]).__name__}. Pass batches for the model"
            )
        return batches


def _check_names(settings: Mapping[str, Any]) -> None:
    """Refuse settings that the callback and `initialize_peft_model` do not have.

    Raises:
        TypeError: by the setting's name.
    """
    parameters = inspect.signature(initialize_peft_model).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    for name, value in settings.items():
        if name not in known:
            raise TypeError(
                f"{name}={value!r} is not supported: the setting must be one of "
                f"{', '.join(['method', 'batches', *known])}"
            )


def _with_fixed_ranks(setting: Any) -> Any:
    """The method with options that keep the configured ranks.

    Raises:
        ValueError: the method always chooses ranks.
    """
    spec, options = resolve(setting)
    if not spec.allocates:
        return setting
    if "rho" not in {field.name for field in dataclasses.fields(options)}:
        raise ValueError(
            f"method={spec.name!r} is not supported in a callback: it chooses the ranks, and the "
            "optimizer has been built for the configured ones. Call initialize_peft_model before "
            "the trainer is made."
        )
    return describe(spec, dataclasses.replace(options, rho=1.0))


def _refuse_best_model(args: Any) -> None:
    """Refuse to load the best model at the end if torch cannot; see `LoraInitCallback.on_save`.

    Raises:
        ValueError: `load_best_model_at_end` with full state dicts on several ranks.
    """
    accelerate = sys.modules.get("accelerate")
    if not args.load_best_model_at_end or rank_count() == 1 or accelerate is None:
        return
    plugin = getattr(accelerate.state.AcceleratorState(), "fsdp_plugin", None)
    if "FULL_STATE_DICT" in str(getattr(plugin, "state_dict_type", None)):
        raise ValueError(
            "load_best_model_at_end=True is not supported with state_dict_type=FULL_STATE_DICT of "
            "FSDP2 and a method that subtracts from the base: must be False. torch cannot load "
            "factors of rank 2r there. Call load_peft_checkpoint(peft_model, "
            "trainer.state.best_model_checkpoint) on a new PEFT model after the training"
        )


def _examples(loader: DataLoader, count: int, seed: int) -> Iterator[Any]:
    """Batches of the loader's data set for this process, without using the loader's own order.

    A map-style data set is sampled without replacement; of an iterable one, the first examples are
    taken.
    """
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    dataset: Any = loader.dataset
    rows: Any
    first, step = rank_number(), rank_count()
    if isinstance(dataset, IterableDataset):
        rows = list(islice(dataset, count * size))
    else:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        rows = Subset(dataset, order[: count * size].tolist())
    mine = Subset(rows, range(first, len(rows), step))
    yield from DataLoader(mine, batch_size=size, collate_fn=loader.collate_fn)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Restore the global generators, so that the training is the same as without calibration."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch
