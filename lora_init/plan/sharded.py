"""Check which sharded weights a method and a configuration support, before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

from torch import nn

from lora_init.distributed import from_ranks
from lora_init.registry import Initializer
from lora_init.weights.format import WeightFormat
from lora_init.weights.offload import stored_weight
from lora_init.weights.sharded import (
    Sharding,
    fsdp_mesh,
    fsdp_unit,
    is_dtensor,
    is_sharded,
    is_unit,
    sharding,
)

BEFORE = "Call get_peft_model before the model is sharded"
IN_CALL = {"DeepSpeed ZeRO-3", "tensor parallelism"}
"""What gathers or computes only inside the call of the module whose weight it shards."""
UNSHARDED = {
    "Linear8bitLt": "fully_shard drops the scales of a Linear8bitLt",
    "compressed-tensors": "its first forward pass replaces the parameters that fully_shard manages",
}
"""Quantized formats whose forward pass fails under FSDP2, with the reason."""


def check_sharded(model: nn.Module, name: str, spec: Initializer, stored: WeightFormat) -> None:
    """Raise if the weight of a target is sharded in a way that the method does not support.

    Raises:
        TypeError: the module's type, the placement of the weight, or the method is not supported.
    """
    how = sharding(model, name)
    if how is None:
        return
    problem = None
    if stored.operation == "routed":
        problem = "it holds the weights of all experts"
    elif stored.operation == "selection":
        problem = "it is a router"
    elif spec.base == "replace":
        problem = f"{spec.name} replaces the weight"
    elif how == "DeepSpeed ZeRO-3":
        problem = _engine(model)
        if problem is None and stored.quantized:
            problem = f"it is a quantized {stored.name}"
        if problem is None and stored.operation == "convolution":
            problem = f"it is a {stored.name}: must be an nn.Linear, a Conv1D or an nn.Embedding"
    elif how == "tensor parallelism" and stored.name not in ("Linear", "torchao"):
        problem = f"it is a {stored.name}: must be an nn.Linear"
    elif stored.name in UNSHARDED:
        problem = UNSHARDED[stored.name]
    elif how == "FSDP2" and fsdp_mesh(model, name) is None:
        problem = "its unit has no sharded parameter, so its mesh is not known"
    elif is_dtensor(weight := stored_weight(model.get_submodule(name))):
        problem = _placements(weight, how)
    if problem is not None:
        raise TypeError(
            f"target {name!r} is not supported: its weight is sharded by {how}, and {problem}. "
            f"{BEFORE}, or leave it out with exclude_modules."
        )


def check_sharded_variants(
    model: nn.Module,
    names: Sequence[str],
    *,
    use_dora: bool,
    lora_bias: bool,
    lora_dropout: float,
    bias: str,
    modules_to_save: Sequence[str],
) -> None:
    """Raise if a setting trains something that cannot be computed from parts of a weight.

    Args:
        names: the targets.
        use_dora, lora_bias, lora_dropout, bias: as in the configuration.
        modules_to_save: full names.

    Raises:
        ValueError: names the setting and a target or a module.
    """
    ways = {name: sharding(model, name) for name in names}
    units = any(is_unit(module) for module in model.modules())
    for name, how in ways.items():
        if how is None and units and fsdp_unit(model, name) is None:
            raise ValueError(
                f"target {name!r} is not supported: it is outside the modules that fully_shard was "
                "called on, so the gradients of its adapter would differ between the ranks. Call "
                "fully_shard on the whole model last, or leave it out with exclude_modules."
            )
        if how is None:
            continue
        alone = how in IN_CALL or fsdp_unit(model, name) is model.get_submodule(name)
        settings = {
            "use_dora=True": use_dora and alone,
            "lora_bias=True": lora_bias and how == "tensor parallelism",
            f"lora_dropout={lora_dropout}": lora_dropout > 0 and how == "tensor parallelism",
            f"bias={bias!r}": bias != "none" and how in IN_CALL,
        }
        for setting in (setting for setting, refused in settings.items() if refused):
            raise ValueError(
                f"{setting} is not supported for {name!r}: must be left out, because its weight is "
                f"sharded by {how}. {BEFORE}, or leave the setting out."
            )
    for name in modules_to_save:
        for path, parameter in model.get_submodule(name).named_parameters(name):
            if is_sharded(parameter):
                raise ValueError(
                    f"modules_to_save={name!r} is not supported: {path!r} is sharded, and a module "
                    f"that is trained whole must be plain. {BEFORE}, or leave it out."
                )


def check_sharded_calibration(
    model: nn.Module, names: Sequence[str], method: str, batches: Any, *, gradients: bool
) -> None:
    """Raise if the calibration cannot run a sharded model.

    Args:
        names: the targets.
        batches: the batches of this rank, or a mapping of sets of them.
        gradients: whether the method reads gradients. Under tensor parallelism, a rank has only
            its part of the outputs' gradients. Parts of the inputs are gathered.

    Raises:
        ValueError: a layer sees only parts of its inputs or weights; or the ranks have different
            numbers of batches, so that one would wait for the others' shards.
    """
    ways = [sharding(model, name) for name in names]
    if "FSDP2" in ways:
        sets = batches.values() if isinstance(batches, Mapping) else [batches]
        lengths = [len(each) if isinstance(each, Sized) else None for each in sets]
        if len(set(map(str, everywhere := from_ranks(lengths)))) > 1:
            raise ValueError(
                f"calibration={everywhere} batches by rank is not supported for a model that "
                "fully_shard was called on: must be the same number on all ranks, because each "
                "forward pass gathers the shards of all. Leave out the last batches of some."
            )
    for name, how in zip(names, ways, strict=True):
        if how in IN_CALL and (gradients or how != "tensor parallelism"):
            reads = "gradients" if gradients else "a forward pass"
            raise ValueError(
                f"init_lora_weights={method!r} needs {reads}, and {name!r} is sharded by "
                f"{how}: pass calibration=<result of lora_init.calibrate on the model before it "
                "was sharded>."
            )


def _placements(weight: Any, how: Sharding) -> str | None:
    """Why the parts of a weight are not supported; None if they are."""
    shards = [place for place in weight.placements if not place.is_replicate()]
    plain = all(type(place).__name__ == "Shard" for place in shards)
    if how == "FSDP2" and (len(shards) != 1 or not plain):
        return f"its placements are {weight.placements}: must be one Shard"
    if how == "tensor parallelism" and (weight.device_mesh.ndim != 1 or not plain):
        return f"its placements are {weight.placements}: must be one Shard or Replicate"
    return None


def _engine(model: nn.Module) -> str | None:
    """Why a model cannot get new parameters under ZeRO-3; None if no engine holds it yet."""
    if hasattr(model, "ds_id") or type(model).__name__ == "DeepSpeedEngine":
        return "deepspeed.initialize has already built its optimizer without the adapter"
    return None
