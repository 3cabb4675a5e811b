"""The model that `get_peft_model` returns: the base model with one adapter."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_init import adapters, checkpoints, injection
from lora_init.config import LoraConfig
from lora_init.diagnostics import InitReport, LayerReport, describe_layer
from lora_init.layers import LoraLayer, TrainedModule
from lora_init.packed import parameter_count
from lora_init.plan import Plan
from lora_init.planning import check_model
from lora_init.presence import HOOK_ATTRIBUTES, absence, first_unloaded
from lora_init.signatures import blank, with_forward_of
from lora_init.verification import Uses, has_compiled_part, is_traced, unused_message


class LoraModel(nn.Module):
    """A base model with one adapter. Forwards to the base model; made by `get_peft_model`.

    Its class is a subclass of this one that has the base model's signature of `forward`.

    Attributes:
        base_model: the model that was injected.
        peft_config: the settings; after a rank allocation its patterns hold the chosen ranks.
        plan: what was done.
    """

    def __new__(cls, base_model: nn.Module | None = None, *args: Any, **kwargs: Any) -> LoraModel:
        if base_model is not None:  # else `blank` asks, and has chosen the class
            cls = with_forward_of(getattr(cls, "family", cls), type(base_model))
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
        super().__init__()
        self.base_model = base_model
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
        self.training = base_model.training  # parts that their owner keeps in eval mode stay so
        self._use_pending = True  # whether no forward pass has shown which layers are used
        self.checkpoint_prefix = ""  # of the state dict that is being loaded
        checkpoints.register(self)
        if first_unloaded(base_model) is not None:
            self.register_forward_pre_hook(_refuse_unloaded)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._use_pending and not is_traced():
            return self._first_forward(*args, **kwargs)
        return self.base_model(*args, **kwargs)

    def _first_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass and warn of adapted layers that it does not use.

        A pass that fails, or runs without the adapter, leaves the check for the next one.
        """
        live = self._injection
        if live is None or has_compiled_part(self.base_model):
            self._use_pending = False
            return self.base_model(*args, **kwargs)
        if live.merged or not live.enabled:
            return self.base_model(*args, **kwargs)
        layers = {**live.layers, **live.trained}
        with Uses(layers) as uses:
            output = self.base_model(*args, **kwargs)
        self._use_pending = False
        if unused := [name for name in layers if name not in uses.used]:
            warnings.warn(unused_message(unused, len(layers)), stacklevel=4)
        return output

    def assume_used(self) -> None:
        """Skip the check of the first forward pass: the layers have been checked already."""
        self._use_pending = False

    def trained_modules(self) -> dict[str, TrainedModule]:
        """The modules that are trained whole, by name."""
        return dict(self._live_injection().trained)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: injection keeps the base's ties, and unties what it must on purpose."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the vocabulary as the base model does, where no embedding is adapted.

        Raises:
            ValueError: the input or output embedding is adapted or trained whole.
        """
        base = self.base_model
        for find in (base.get_input_embeddings, base.get_output_embeddings):
            module = find()
            if (args or kwargs) and isinstance(module, LoraLayer | TrainedModule):
                raise ValueError(
                    "resize_token_embeddings: the adapter contains the model's input or output "
                    "embedding, whose size is fixed. Resize the base model before get_peft_model, "
                    "or leave both embeddings out of target_modules and modules_to_save"
                )
        return base.resize_token_embeddings(*args, **kwargs)

    def __reduce__(self) -> tuple:
        family = getattr(type(self), "family", type(self))
        return blank, (family, type(self.base_model)), self.__dict__

    def _get_name(self) -> str:
        """The base model's, by which Trainer's label smoothing knows that labels are shifted."""
        return self.base_model._get_name()

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """transformers' mark of a model with an adapter: Trainer refuses quantised ones without."""
        return self._injection is not None

    def __getattr__(self, name: str) -> Any:
        """Whatever this class does not have (generate, config, device, …) is the base model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # base_model: not set yet, and must not recurse.
            if name in ("base_model", *HOOK_ATTRIBUTES):
                raise
            return getattr(self.base_model, name)

    @property
    def layers(self) -> dict[str, LoraLayer]:
        """The adapted layers by name."""
        return dict(self._live_injection().layers)

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all): as PEFT counts, the untouched originals of saved modules included."""
        counted = [(parameter_count(p), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in counted if trained), sum(n for n, _ in counted)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def init_report(self) -> InitReport:
        """What the initialization did, per layer. Print it, or take its `to_dict()`.

        The figures of a kept or subtracted base are computed now, from the initial factors and the
        restored weights; the model's state of training does not change them. Weights that are not
        in memory are read one layer at a time, from where they were read before.
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
        """Inside this context the model computes its original function.

        Raises:
            RuntimeError: where a base was replaced and no copy of the original was kept.
        """
        live = self._live_injection()
        if live.originals or live.biases:  # data is exchanged; else the forward pass does it
            self._whole_injection("disable_adapter")
        before = injection.set_adapter_enabled(live, False)
        try:
            yield
        finally:
            if self._injection is live:  # else it was unloaded inside, and is off for good
                injection.set_adapter_enabled(live, before)

    def merge_adapter(self) -> None:
        """Fold the adapter into the base weights, for inference; `unmerge_adapter` undoes it.

        The base weights are held meanwhile, so that they come back to the bit.

        Raises:
            ValueError: a layer has a lora_bias and its base no bias.
        """
        injection.set_merged(self._whole_injection("merge_adapter"), True)

    def unmerge_adapter(self) -> None:
        """Take the adapter out of the base weights again."""
        injection.set_merged(self._live_injection(), False)

    def merge_and_unload(self) -> nn.Module:
        """Fold the adapter into the base weights and return the plain base model."""
        model = injection.merge(self.base_model, self._whole_injection("merge_and_unload"))
        self._injection = None
        return model

    def unload(self) -> nn.Module:
        """Remove the adapter and return the base model with its original weights.

        Raises:
            RuntimeError: where a base was replaced and no copy of the original was kept.
        """
        self.detach_adapter()
        return self.base_model

    def delete_adapter(self) -> nn.Module:
        """The same as `unload`: one adapter a model."""
        return self.unload()

    def detach_adapter(self) -> injection.Injection:
        """Unload, and return what `attach_adapter` needs to undo it."""
        live = self._whole_injection("unload", without_base=True)
        injection.restore(self.base_model, live)
        self._injection = None
        return live

    def attach_adapter(self, detached: injection.Injection) -> None:
        """Put an adapter back that `detach_adapter` took off, as trained."""
        injection.reinstate(self.base_model, detached)
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
        save_function: Any = None,
        max_shard_size: Any = None,
        push_to_hub: bool = False,
    ) -> None:
        """Write the adapter; see `lora_init.adapters` for the files.

        The arguments are PEFT's and transformers', in PEFT's order.

        Args:
            folder: made if it does not exist.
            safe_serialization: True; a pickle is never written.
            selected_adapters: None or ["default"]: there is one adapter.
            save_embedding_layers: whether the file holds the base's embeddings too. "auto": where
                they are adapted, or the vocabulary has another size than the base was saved with.
            is_main_process: False writes nothing.
            path_initial_model_for_weight_conversion: not needed, since the file is for the
                original base anyway; ignored with a warning.
            state_dict: the model's state dict where a trainer has gathered it from shards.
            portable: write a file that PEFT, vLLM and llama.cpp scale alike. It is loaded as a
                plain adapter of its rank, 2r after a subtracting start.
            save_function, max_shard_size: ignored: an adapter is one file, written atomically.
            push_to_hub: must be False.

        Raises:
            RuntimeError: it is merged or disabled at the moment.
            ValueError: a setting that is not supported; nothing is written then.
        """
        self.refuse_in_between("save_pretrained")
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False is not supported: must be True, since a pickle can run "
                "code when it is loaded. Leave it out"
            )
        if selected_adapters is not None and list(selected_adapters) != ["default"]:
            raise ValueError(
                f"selected_adapters={selected_adapters!r} is not supported: must be None or "
                "['default'], the one adapter of this model. Leave it out"
            )
        if push_to_hub:
            raise ValueError(
                "push_to_hub=True is not supported: must be False. Save the adapter, then upload "
                "the folder with huggingface_hub.upload_folder"
            )
        if path_initial_model_for_weight_conversion is not None:
            warnings.warn(
                "path_initial_model_for_weight_conversion is ignored: the file is for the original "
                "base model already",
                stacklevel=2,
            )
        if not is_main_process:
            return
        live = self._live_injection()
        if state_dict is None:
            live = self._whole_injection("save_pretrained", without_base=True)
        adapters.save(
            Path(folder),
            self.base_model,
            self.peft_config,
            self.plan,
            live,
            state=state_dict,
            save_embedding_layers=save_embedding_layers,
            portable=portable,
        )

    @classmethod
    @torch.inference_mode(False)  # tensors made in inference mode cannot be trained
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
        """Load an adapter, written by us or by PEFT, onto its original base model.

        Args:
            base: the model it was trained on, which may be on the meta device; changed in place.
            folder: where `save_pretrained` wrote it.
            is_trainable: False freezes it.
            adapter_dtype, original_weights, keep_original: as of `get_peft_model`.

        Raises:
            FileNotFoundError, ValueError: no, a damaged, or another base's adapter; `base` is
                unchanged then.
        """
        check_model(base)
        injection.refuse_adapted(base)
        loaded = adapters.read(Path(folder), base, adapter_dtype, original_weights)
        loaded.config.inference_mode = not is_trainable
        with adapters.rows_in_place(base, loaded.rows):
            plain = injection.hold_plain(base)
            try:
                done = injection.inject(
                    base,
                    loaded.plan,
                    loaded.factors,
                    weights=loaded.weights,
                    plain=plain,
                    keep_original=keep_original,
                    initial_known=loaded.plan.initializer.base != "keep",
                )
            except BaseException:
                injection.release(plain)
                raise
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
        """The base's biases that are trained, by name, and what they were."""
        return {} if self._injection is None else dict(self._injection.biases)

    def move_initial_factors(self, name: str, lora_A: Tensor, lora_B: Tensor) -> None:
        """Give a layer the initial factors of another start, and its base what belongs to them."""
        wanted = "load_state_dict with other initial factors"
        live = self._whole_injection(wanted, without_base=not self.plan.use_dora)
        injection.move_initial_factors(live.layers[name], lora_A, lora_B)

    def _live_injection(self) -> injection.Injection:
        if self._injection is None:
            raise RuntimeError("the adapter was unloaded; call get_peft_model again")
        return self._injection

    def _whole_injection(self, wanted: str, *, without_base: bool = False) -> injection.Injection:
        """The live injection, all of whose tensors are in this process's memory.

        Args:
            without_base: base weights may be on the meta device, as long as they are as they were
                before injection: `wanted` does not touch them.

        Raises:
            RuntimeError: one is sharded, partitioned, offloaded or not loaded.
        """
        live = self._live_injection()
        for name, layer in live.layers.items():
            for part in ("lora_A", "lora_B", "base_layer.weight"):
                parameter = layer.get_parameter(part)
                untouched = part == "base_layer.weight" and layer.base_state != "edited"
                if without_base and untouched and parameter.is_meta:
                    continue
                if reason := absence(parameter):
                    raise RuntimeError(
                        f"{wanted}: the parameter '{name}.{part}' is {reason}; gather the adapter "
                        "(torch.distributed.checkpoint.state_dict.get_model_state_dict, or "
                        "FullyShardedDataParallel.summon_full_params), load it into a model that "
                        "is whole in memory, and call this there"
                    )
        return live

    def refuse_in_between(self, wanted: str) -> None:
        """Refuse what would read or write other values while the adapter is merged or off."""
        live = self._live_injection()
        if live.merged:
            raise RuntimeError(f"{wanted}: the adapter is merged; call unmerge_adapter() first")
        if not live.enabled:
            raise RuntimeError(f"{wanted}: the adapter is disabled; leave disable_adapter() first")


def _refuse_unloaded(model: LoraModel, _: Any) -> None:
    """Refuse a forward pass through a model that was not loaded when it was injected.

    torch's own error names no way out, and replaced bases would not be there even after loading.

    Raises:
        RuntimeError: a weight is on the meta device, or should have been replaced.
    """
    name = first_unloaded(model.base_model)
    if name is not None or model.plan.initializer.base == "replace":
        raise RuntimeError(
            f"forward: {name or 'the base model'!r} was never loaded, it was on the meta device; "
            "save the adapter (save_pretrained), load the base model, and put it on with "
            "LoraModel.from_pretrained(base, folder)"
        )
