"""`LoraModel`: the result of `get_peft_model`, a base model with one adapter."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_init import adapters, injection
from lora_init.adapters.diffusers_file import write_diffusers
from lora_init.adapters.diffusers_format import component_of
from lora_init.adapters.file_layers import AdapterFile, read_layers
from lora_init.adapters.hub import push_adapter
from lora_init.config.lora_config import LoraConfig
from lora_init.distributed import rank_number
from lora_init.factors import Replacement
from lora_init.layers import LoraLayer, TrainedModule
from lora_init.model import state_dict as checkpoints
from lora_init.model.base_methods import cover_methods, uncover_methods
from lora_init.model.report import InitReport, LayerReport, describe_layer
from lora_init.model.signatures import blank, bound_to_base, with_forward_of
from lora_init.model.verification import (
    Uses,
    has_compiled_part,
    is_traced,
    no_gradient_message,
    read_message,
    unused_message,
    without_gradient,
)
from lora_init.plan.attention import split_on_success
from lora_init.plan.make import check_model
from lora_init.plan.plan import Plan
from lora_init.weights.bitsandbytes import parameter_count
from lora_init.weights.offload import (
    HOOK_ATTRIBUTES,
    absence,
    first_unloaded,
)
from lora_init.weights.sharded import is_dtensor, is_sharded, reshard


class LoraModel(nn.Module):
    """A base model with one adapter. `get_peft_model` creates it.

    Missing attributes are taken from the base model. The class of an instance is a subclass of this
    one whose `forward` has the base model's signature.

    Attributes:
        base_model: the base model, modified in place.
        peft_config: the settings. After a rank allocation, its patterns hold the chosen ranks.
        plan: the adapted layers, the method and its options.
    """

    def __new__(cls, base_model: nn.Module | None = None, *args: Any, **kwargs: Any) -> LoraModel:
        if base_model is not None:  # None: `blank` calls this with the final class
            final: Any = with_forward_of(getattr(cls, "family", cls), type(base_model))
            return super().__new__(final)
        return super().__new__(cls)

    def __init__(
        self,
        base_model: nn.Module,
        peft_config: LoraConfig,
        plan: Plan,
        done: injection.Injection,
        report: InitReport,
        metrics: dict[str, dict[str, Any]],
        seconds_by_layer: dict[str, float],
    ) -> None:
        nn.Module.__init__(self)  # the class may also be transformers' PreTrainedModel
        self.base_model: Any = base_model
        self.peft_config = peft_config
        self.plan = plan
        self._injection = done
        self._report = report
        self._metrics = metrics
        self._seconds_by_layer = seconds_by_layer
        if peft_config.base_model_name_or_path is None:
            name = getattr(getattr(base_model, "config", None), "_name_or_path", None)
            peft_config.base_model_name_or_path = name or None
        if peft_config.inference_mode:
            self.requires_grad_(False)
        self.training = base_model.training  # do not change the modes of submodules
        self._use_pending = True  # the first forward pass checks which layers are used
        self._gradient_pending = True  # the first one with a graph checks which layers can learn
        self._read_layers: list[str] = []  # their weight was read without a call
        self.checkpoint_prefix = ""  # prefix of the state dict that is being loaded
        self.loading: injection.Transaction | None = None  # undoes an unfinished load
        checkpoints.register(self)
        cover_methods(self, base_model)
        if first_unloaded(base_model) is not None:
            self.register_forward_pre_hook(_refuse_unloaded)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.loading is not None:
            self.undo_broken_loading()
        pending = self._use_pending or (self._gradient_pending and torch.is_grad_enabled())
        if pending and not is_traced():
            return self._first_forward(*args, **kwargs)
        return self.base_model(*args, **kwargs)

    def _first_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass and warn about adapted layers that it does not use, or that cannot learn.

        A pass that fails or runs without the adapter defers both checks to the next pass. A pass
        without a graph defers the second one.
        """
        live = self._injection
        if live is None or has_compiled_part(self.base_model):
            self._use_pending = self._gradient_pending = False
            return self.base_model(*args, **kwargs)
        if live.merged or not live.enabled:
            return self.base_model(*args, **kwargs)
        layers = {**live.layers, **live.trained}
        with Uses(layers) as uses:
            output = self.base_model(*args, **kwargs)
        unused = [name for name in layers if name not in uses.used]
        if unused and self._use_pending:
            warnings.warn(unused_message(unused, len(layers)), stacklevel=4)
        self.assume_used(uses)
        if torch.is_grad_enabled():
            self._gradient_pending = False
            used = {name: layer for name, layer in layers.items() if name in uses.used}
            if still := without_gradient(used, output):
                warnings.warn(no_gradient_message(still, len(layers)), stacklevel=4)
        return output

    def assume_used(self, uses: Uses) -> None:
        """Store how the layers are used, and skip the check in the next forward pass."""
        self._use_pending = False
        read = uses.used - uses.called
        # PEFT's layer for an attention module reads the weights of its projections too.
        plain = [target.name for target in self.plan.targets if target.attention is None]
        self._read_layers = [name for name in plain if name in read]

    def trained_modules(self) -> dict[str, TrainedModule]:
        """The fully trained modules, by name."""
        return dict(self._live_injection().trained)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: injection handles tied weights."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the vocabulary of the base model if no embedding is adapted.

        Raises:
            ValueError: the input or output embedding is adapted or fully trained.
        """
        base = self.base_model
        for find in (base.get_input_embeddings, base.get_output_embeddings):
            module = find()
            if (args or kwargs) and isinstance(module, LoraLayer | TrainedModule):
                raise ValueError(
                    "resize_token_embeddings is not supported if the adapter contains the input "
                    "or output embedding. Resize the base model before get_peft_model, or leave "
                    "both embeddings out of target_modules and modules_to_save."
                )
        return base.resize_token_embeddings(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the adapter of a checkpoint, like `torch.nn.Module.load_state_dict`.

        If that fails, the model does not change.

        Raises:
            ValueError: a tensor is missing, unknown, not finite or has a wrong shape; or the
                checkpoint belongs to another method.
            RuntimeError: the adapter is merged or disabled.
        """
        try:
            return nn.Module.load_state_dict(self, *args, **kwargs)
        except BaseException:
            self.undo_broken_loading()
            raise

    def get_extra_state(self) -> Tensor:
        """The tensor that identifies the method in a state dict; torch calls this."""
        return torch.empty(0) if self._injection is None else checkpoints.start_of(self)

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: the identification was checked before."""

    def undo_broken_loading(self) -> None:
        """Undo a `load_state_dict` that failed.

        If an outer module failed to load, this model cannot notice. Its next call then undoes it.
        """
        if self.loading is not None:
            self.loading.roll_back()
            self.loading = None

    def __reduce__(self) -> tuple:
        family = getattr(type(self), "family", type(self))
        return blank, (family, type(self.base_model)), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._injection is not None:
            cover_methods(self, self.base_model)

    def _get_name(self) -> str:
        """The base model's name, from which Trainer's label smoothing decides to shift labels."""
        return self.base_model._get_name()

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            value = bound_to_base(value, self, self.base_model)
        super().__setattr__(name, value)

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """Whether an adapter is active; Trainer requires this for quantized models."""
        return self._injection is not None

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base model, such as `generate`, `config` or `device`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # base_model may not be set yet, which would recurse. get_compiler_config marks a
            # compiled model; this model is not compiled if its base is.
            if name in ("base_model", *HOOK_ATTRIBUTES, "get_compiler_config"):
                raise
            return getattr(self.base_model, name)

    @property
    def layers(self) -> dict[str, LoraLayer]:
        """The adapted layers, by name."""
        return dict(self._live_injection().layers)

    @property
    def replacements(self) -> dict[str, Replacement]:
        """How to compute each replaced base weight from the original one, by layer name."""
        return dict(self._live_injection().replacements)

    def get_base_model(self) -> nn.Module:
        """The base model with its adapted layers."""
        return self.base_model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count trainable and all parameters as PEFT does, with the originals of saved modules."""
        counted = [(parameter_count(p), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in counted if trained), sum(n for n, _ in counted)

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters and of all parameters."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def init_report(self) -> InitReport:
        """Report the initialization of each layer. Print the result, or call its `to_dict()`.

        Metrics of kept and subtracted bases are computed by this call, from the initial factors and
        the original weights. Training does not change them. Weights that are not in memory are read
        again, one layer at a time.
        """
        live = self._whole_injection("init_report", without_base=True)
        layers = []
        for target in self.plan.targets:
            row = LayerReport.of(target, self._seconds_by_layer.get(target.name))
            describe_layer(
                live.layers[target.name],
                row,
                self._metrics.get(target.name, {}),
                partial(live.original_weight, target),
            )
            layers.append(row)
        left_out = list(self.plan.left_out)
        return dataclasses.replace(self._report, layers=layers, left_out=left_out)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model computes the output of the original base model.

        Raises:
            RuntimeError: a base weight was replaced, and no copy of the original exists.
        """
        live = self._live_injection("disable_adapter")
        if live.originals or live.biases:  # their data is replaced; other layers switch in forward
            self._whole_injection("disable_adapter")
        before = live.enabled
        try:
            try:
                injection.atomically(partial(injection.set_adapter_enabled, live, False))
                yield
            finally:
                self._switch(live, before)
        finally:  # again, in case an interrupt stopped the first call
            self._switch(live, before)

    def _switch(self, live: injection.Injection, enabled: bool) -> None:
        if self._injection is live:  # else it was unloaded inside the context
            injection.atomically(partial(injection.set_adapter_enabled, live, enabled))

    def merge_adapter(self) -> None:
        """Merge the adapter into the base weights for inference; `unmerge_adapter` undoes it.

        A copy of the base weights is kept, so `unmerge_adapter` restores them bit for bit.

        Raises:
            ValueError: a layer has a lora_bias, but its base module has no bias.
        """
        live = self._whole_injection("merge_adapter")
        injection.atomically(partial(injection.set_merged, live, True))

    def unmerge_adapter(self) -> None:
        """Restore the base weights after `merge_adapter`."""
        live = self._live_injection("unmerge_adapter")
        injection.atomically(partial(injection.set_merged, live, False))

    def merge_and_unload(self) -> nn.Module:
        """Merge the adapter into the base weights and return the plain base model.

        No copy of the base weights is kept, so this cannot be undone. It needs memory for one more
        weight. If it fails halfway, the model still computes the same output; call it again.
        """
        live = self._whole_injection("merge_and_unload", half_merged=True)
        if not live.merged:
            injection.fold(live)
        return injection.atomically(partial(self._remove, injection.unwrap_merged, live))

    def unload(self) -> nn.Module:
        """Remove the adapter and return the base model with its original weights.

        Raises:
            RuntimeError: a base weight was replaced, and no copy of the original exists.
        """
        live = self._whole_injection("unload", without_base=True)
        return injection.atomically(partial(self._remove, injection.restore, live))

    def delete_adapter(self) -> nn.Module:
        """Like `unload`, since a model has one adapter."""
        return self.unload()

    def detach_adapter(
        self, transaction: injection.Transaction | None = None
    ) -> injection.Injection:
        """Remove the adapter and return it for `attach_adapter`.

        Args:
            transaction: restores the adapter if a later step fails.
        """
        live = self._whole_injection("unload", without_base=True)
        if transaction is None:
            injection.atomically(partial(self._remove, injection.restore, live))
        else:
            self._remove(injection.restore, live, transaction)
        return live

    def _remove(
        self,
        way: Callable[[nn.Module, injection.Injection, injection.Transaction], None],
        live: injection.Injection,
        transaction: injection.Transaction,
    ) -> nn.Module:
        """Remove the adapter from the base model with the function `way`."""
        transaction.undo_by(partial(cover_methods, self, self.base_model))
        uncover_methods(self.base_model)
        way(self.base_model, live, transaction)
        transaction.attributes(self, "_injection")
        self._injection = None
        return self.base_model

    def attach_adapter(self, detached: injection.Injection) -> None:
        """Restore a trained adapter that `detach_adapter` removed.

        If it is already attached, nothing happens.

        Raises:
            RuntimeError: another adapter is attached.
        """
        if self._injection is detached:
            return
        if self._injection is not None:
            raise RuntimeError("another adapter is attached; call detach_adapter() first")
        injection.atomically(partial(self._attach, detached))

    def _attach(self, detached: injection.Injection, transaction: injection.Transaction) -> None:
        transaction.undo_by(partial(uncover_methods, self.base_model))
        injection.reinstate(self.base_model, detached, transaction)
        cover_methods(self, self.base_model)
        transaction.attributes(self, "_injection")
        self._injection = detached

    def save_pretrained(
        self,
        folder: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        portable: bool = False,
        format: str = "peft",
        component: str | None = None,
        save_function: Any = None,
        max_shard_size: Any = None,
        push_to_hub: bool = False,
    ) -> None:
        """Save the adapter in PEFT's format; see `lora_init.adapters` for the files.

        The arguments are those of PEFT and transformers, in PEFT's order. If the adapter is sharded
        (FSDP2, tensor parallelism, DeepSpeed ZeRO-3), all ranks must call this without
        `state_dict`: it gathers the adapter one tensor at a time, and rank 0 writes the files.

        Args:
            folder: the folder to write, which is created if needed.
            safe_serialization: must be True, since pickles are not supported.
            selected_adapters: must be None or ["default"], since a model has one adapter.
            save_embedding_layers: whether to save the base model's embeddings. "auto" saves them if
                they are adapted, or if the vocabulary size has changed since the base was saved.
            is_main_process: False writes nothing.
            path_initial_model_for_weight_conversion: ignored with a warning, since the file always
                fits the original base model.
            state_dict: the model's state dict, gathered from shards, as trainers pass it. If the
                argument is given, `model.safetensors` is also written, for transformers' Trainer.
            portable: whether to write a file that PEFT, vLLM and llama.cpp scale alike. It loads as
                a plain adapter of its rank, which is 2r for methods that subtract from the base.
            format: "peft", or "diffusers" for `pytorch_lora_weights.safetensors`, which diffusers'
                `load_lora_weights` and `load_lora_adapter` read. It has s B in place of B.
            component: the model's name in its pipeline, such as "unet" or "transformer", with
                format="diffusers". None chooses it by the model's class.
            save_function: ignored, since the file is written atomically.
            max_shard_size: ignored, since an adapter is one file.
            push_to_hub: must be False. Call `push_to_hub` of the model instead.

        Raises:
            RuntimeError: the adapter is merged or disabled.
            ValueError: a setting is not supported. Nothing is written then.
        """
        self.refuse_in_between("save_pretrained")
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False is not supported: must be True, since a pickle can run "
                "code when it is loaded. Leave it out."
            )
        if selected_adapters is not None and list(selected_adapters) != ["default"]:
            raise ValueError(
                f"selected_adapters={selected_adapters!r} is not supported: must be None or "
                "['default'], the one adapter of this model. Leave it out."
            )
        if push_to_hub:
            raise ValueError(
                "push_to_hub=True is not supported: must be False. Call model.push_to_hub(repo_id)."
            )
        if path_initial_model_for_weight_conversion is not None:
            warnings.warn(
                "path_initial_model_for_weight_conversion is ignored, since the file already fits "
                "the original base model.",
                stacklevel=2,
            )
        if format not in ("peft", "diffusers"):
            raise ValueError(
                f"format={format!r} is not supported: must be one of 'peft', 'diffusers'. Leave it "
                "out for PEFT's format."
            )
        if format == "diffusers" and portable:
            raise ValueError(
                "portable=True is not supported with format='diffusers', which diffusers alone "
                "reads. Leave out one of them."
            )
        if component is not None and format != "diffusers":
            raise ValueError(
                f"component={component!r} is not supported with format={format!r}: it is a name in "
                "diffusers' file. Leave it out, or add format='diffusers'."
            )
        live = self._live_injection("save_pretrained")
        gathers = state_dict is None and self._is_sharded()
        if format == "diffusers" and gathers:
            raise ValueError(
                "format='diffusers' is not supported for a sharded adapter: must be 'peft'. Save "
                "in PEFT's format, load that into a whole model, and save it there."
            )
        if not is_main_process and not gathers:
            return
        if self._read_layers:
            warnings.warn(read_message(self._read_layers), stacklevel=2)
        if state_dict is None and not gathers:
            live = self._whole_injection("save_pretrained", without_base=True)
        if format == "diffusers":
            found = self._as_plain_file(live, state_dict)
            write_diffusers(Path(folder), found, component or component_of(self.base_model))
            return
        adapters.save_adapter(
            Path(folder),
            self.base_model,
            self.peft_config,
            self.plan,
            live,
            state=state_dict,
            save_embedding_layers=save_embedding_layers,
            portable=portable,
            write=is_main_process and not (gathers and rank_number()),
        )

    def _as_plain_file(
        self, live: injection.Injection, state: Mapping[str, Tensor] | None
    ) -> AdapterFile:
        """The layers of the adapter as a file for the original base holds them."""
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            # Only the configuration of such a file would be read differently.
            warnings.filterwarnings("ignore", message="other loaders would scale")
            adapters.save_adapter(
                Path(folder), self.base_model, self.peft_config, self.plan, live,
                state=state, save_embedding_layers=False,
            )  # fmt: skip
            return read_layers(Path(folder))

    def push_to_hub(self, repo_id: str, **settings: Any) -> Any:
        """Upload the adapter, with a model card, to the Hugging Face Hub.

        Args:
            repo_id: the repository, such as "user/adapter", which is created if needed.
            settings: arguments of `lora_init.adapters.hub.push_adapter`.
        """
        method = self.plan.initializer.name
        return push_adapter(self.save_pretrained, self.peft_config, method, repo_id, **settings)

    @classmethod
    def from_pretrained(
        cls,
        base: nn.Module,
        folder: str | Path,
        *,
        is_trainable: bool = True,
        adapter_dtype: torch.dtype = torch.float32,
        original_weights: str | PathLike | Mapping[str, Tensor] | None = None,
        keep_original: bool = False,
    ) -> LoraModel:
        """Load an adapter of lora_init or PEFT into its original base model.

        Args:
            base: the model that the adapter was trained on, which is modified in place. It may be
                on the meta device.
            folder: the folder that `save_pretrained` wrote.
            is_trainable: False freezes the adapter.
            adapter_dtype, original_weights, keep_original: see `get_peft_model`.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file is damaged, or belongs to another base model. `base` does not change.
        """
        check_model(base)
        injection.refuse_adapted(base)
        with split_on_success(base, []):
            loaded = adapters.read(Path(folder), base, adapter_dtype, original_weights)
            loaded.config.inference_mode = not is_trainable
            return injection.atomically(partial(cls._filled, base, loaded, keep_original))

    @classmethod
    def _filled(
        cls,
        base: nn.Module,
        loaded: adapters.LoadedAdapter,
        keep_original: bool,
        transaction: injection.Transaction,
    ) -> LoraModel:
        transaction.undo_by(partial(uncover_methods, base))
        adapters.put_rows(base, loaded.rows, transaction)
        done = injection.inject_factors(
            base,
            loaded.plan,
            loaded.factors,
            transaction=transaction,
            weights=loaded.weights,
            plain=injection.hold_plain(base, transaction),
            keep_original=keep_original,
            initial_known=loaded.plan.initializer.base != "keep",
        )
        adapters.fill(done, loaded)
        done.embedding_rows = bool(loaded.rows)
        spec = loaded.plan.initializer
        report = InitReport(
            method=spec.name,
            options=dataclasses.asdict(loaded.plan.options),
            base=spec.base,
            needs_calibration=loaded.plan.calibration is not None,
            seconds={},
            calibration_tokens=0,
            layers=[],
        )
        return cls(base, loaded.config, loaded.plan, done, report, {}, {})

    def trained_biases(self) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """The trained biases of the base model and their original values, by name."""
        return {} if self._injection is None else dict(self._injection.biases)

    def move_initial_factors(
        self,
        name: str,
        lora_A: Tensor,
        lora_B: Tensor,
        transaction: injection.Transaction | None = None,
    ) -> None:
        """Replace the initial factors of a layer, and update its base weight to match."""
        wanted = "load_state_dict with other initial factors"
        live = self._live_injection()
        layer = live.layers[name]
        # The original base of a sharded layer stays as it is.
        if layer.base_state == "edited" or not is_sharded(layer.stored_weight):
            live = self._whole_injection(wanted, without_base=not self.plan.use_dora)
        move = partial(injection.move_initial_factors, live.layers[name], lora_A, lora_B)
        if transaction is None:
            injection.atomically(move)
        else:
            move(transaction)

    def _live_injection(self, wanted: str | None = None) -> injection.Injection:
        """Return the injection.

        Args:
            wanted: the name of an operation that is not supported if the adapter is half merged.

        Raises:
            RuntimeError: the adapter was unloaded, or `merge_and_unload` failed halfway.
        """
        self.undo_broken_loading()
        if self._injection is None:
            raise RuntimeError("the adapter was unloaded. Call get_peft_model again.")
        if wanted is not None and (name := self._injection.half_merged()) is not None:
            raise RuntimeError(
                f"{wanted}: merge_and_unload failed after it had merged {name!r}. Call "
                "merge_and_unload again, or reload the base model."
            )
        return self._injection

    def _whole_injection(
        self, wanted: str, *, without_base: bool = False, half_merged: bool = False
    ) -> injection.Injection:
        """Return the injection if all its tensors are in the memory of this process.

        Args:
            wanted: the name of the operation, for messages.
            without_base: accept unmodified base weights on the meta device, for operations that do
                not use them; and DTensors around an unmodified base, which all ranks can gather.
            half_merged: accept an adapter for which `merge_and_unload` failed halfway.

        Raises:
            RuntimeError: a tensor is sharded, partitioned, offloaded or not loaded.
        """
        live = self._live_injection(None if half_merged else wanted)
        reshard(self.base_model)
        for name, layer in live.layers.items():
            core = () if layer.lora_core is None else ("lora_core",)
            base = f"base_layer.{layer.matrix}"
            names = ("lora_A", "lora_B", *core)
            parts: dict[str, Tensor] = {part: layer.get_parameter(part) for part in names}
            parts[base] = layer.stored_weight
            for part, parameter in parts.items():
                untouched = part == base and layer.base_state != "edited"
                if without_base and untouched and parameter.is_meta:
                    continue
                # Around an original base, what needs the factors gathers them.
                original = layer.base_state in ("kept", "in_forward")
                gathers = is_dtensor(parameter) or (untouched and is_sharded(parameter))
                if without_base and original and gathers:
                    continue
                if reason := absence(parameter):
                    raise RuntimeError(
                        f"{wanted}: the parameter '{name}.{part}' is {reason}. Gather the adapter "
                        "(torch.distributed.checkpoint.state_dict.get_model_state_dict, or "
                        "FullyShardedDataParallel.summon_full_params), load it into a model that "
                        "is fully in memory, and call this there."
                    )
        return live

    def _is_sharded(self) -> bool:
        """Whether the ranks hold the adapter in parts."""
        live = self._live_injection()
        reshard(self.base_model)
        return any(is_sharded(layer.lora_A) for layer in live.layers.values())

    def refuse_in_between(self, wanted: str) -> None:
        """Raise a RuntimeError if the adapter is merged or disabled."""
        live = self._live_injection(wanted)
        if live.merged:
            raise RuntimeError(f"{wanted}: the adapter is merged. Call unmerge_adapter() first.")
        if not live.enabled:
            raise RuntimeError(f"{wanted}: the adapter is disabled. Exit disable_adapter() first.")


def _refuse_unloaded(model: LoraModel, _: Any) -> None:
    """Raise in a forward pass if the model was on the meta device during injection.

    torch's error does not say what to do. Replaced base weights would be missing even if the model
    were loaded later.

    Raises:
        RuntimeError: a weight is on the meta device, or the method replaces base weights.
    """
    name = first_unloaded(model.base_model)
    if name is not None or model.plan.initializer.base == "replace":
        raise RuntimeError(
            f"forward: {name or 'the base model'!r} was never loaded from the meta device. Save "
            "the adapter (save_pretrained), load the base model, and call "
            "LoraModel.from_pretrained(base, folder)."
        )
