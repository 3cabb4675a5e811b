"""Read each target's weight from the model, from offloaded storage, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init import linalg
from lora_init.distributed import from_ranks, rank_count, rank_number
from lora_init.weights.checkpoint import OriginalWeights, stored_name
from lora_init.weights.fingerprint import fingerprint
from lora_init.weights.kinds import FORMATS, known_format
from lora_init.weights.offload import (
    factor_device,
    is_offloaded,
    is_unloaded,
    offloaded_weight,
    stored_weight,
)
from lora_init.weights.sharded import group_size, has_own_scales, is_sharded, module_on

if TYPE_CHECKING:
    from lora_init.plan.plan import Target
    from lora_init.weights.second import SecondWeights

# FP4, bitsandbytes' coarsest format, has an error of 0.2. Another checkpoint differs by about 1.4.
LARGEST_QUANTIZATION_ERROR = 0.7


class BaseWeights:
    """The targets' weights as ``(out, in)``, one at a time.

    | the module's weight | `present` | `weight` |
    |---|---|---|
    | float, in memory | a view of it | the same |
    | offloaded by Accelerate | read from the offloaded storage | the same |
    | not loaded, on the meta device | read from the checkpoint | the same |
    | quantized | dequantized values | read from the checkpoint, if one is given |
    | sharded over ranks | gathered by every call, on all ranks | the same |

    Values that are read are mapped from their file and freed with the last reference. A model
    larger than memory is therefore processed layer by layer.

    Args:
        model: the base model.
        original_weights: the checkpoint (see `OriginalWeights`). Not read for weights that the
            model has.
        second: the second weights, for methods that read "target_weight".
    """

    def __init__(
        self,
        model: nn.Module,
        original_weights: str | PathLike | Mapping[str, Tensor] | None,
        second: SecondWeights | None = None,
    ) -> None:
        self.model = model
        self.second = second
        self.originals = None if original_weights is None else OriginalWeights(original_weights)
        self._gathered: dict[str, Tensor] = {}
        self._fingerprints: dict[str, str] = {}  # of sharded weights

    def check(self, targets: tuple[Target, ...]) -> None:
        """Raise if a checkpoint does not fit these targets or is not needed. Reads no weight.

        Raises:
            ValueError: as `check_unloaded`; a quantized target's weight is missing or has another
                shape; no target is read from the checkpoint.
        """
        self.check_unloaded(targets)
        if self.originals is None:
            return
        if not any(target.quantized or self._is_unloaded(target) for target in targets):
            raise ValueError(
                "original_weights is given, but no target is quantized or unloaded (on the meta "
                "device): their weights are the original ones; leave it out"
            )
        self._check_stored(self.originals, [target for target in targets if target.quantized])

    def check_unloaded(self, targets: tuple[Target, ...]) -> None:
        """Raise if a weight is neither loaded nor in the checkpoint.

        Raises:
            ValueError: no checkpoint was passed, or a weight is missing there or has another shape.
        """
        unloaded = [target for target in targets if self._is_unloaded(target)]
        if not unloaded:
            return
        if self.originals is None:
            raise _nowhere(unloaded[0])
        self._check_stored(self.originals, unloaded)

    def is_readable(self, target: Target) -> bool:
        """Whether the values of the weight can be read, as those of few quantizers cannot."""
        module = self._module(target)
        return known_format(module).opaque(module) is None

    def is_original(self, target: Target) -> bool:
        """Whether `weight` returns the weight from before quantization."""
        return not target.quantized or self.originals is not None

    def weight(self, target: Target) -> Float[Tensor, "*experts out in"]:
        """The original weight, on the device of the module's factors.

        It is float32 for quantized modules. For others it has the module's dtype, to which a
        checkpoint's weight is cast, as when loading the model.

        Raises:
            ValueError: the checkpoint's weight is not the one that was quantized.
        """
        present = self.present(target)
        if not target.quantized or self.originals is None:
            return present
        original = self.originals.weight(target.name)
        if self._stored_transposed(target):
            original = original.T
        original = original.to(present.device, torch.float32)
        norm = linalg.frobenius_norm(original)
        error = linalg.frobenius_norm(present - original) / norm
        if norm > 0 and error > LARGEST_QUANTIZATION_ERROR:
            raise ValueError(
                f"original_weights: the weight of {target.name!r} differs from the model's by "
                f"{float(error):.2f} of its norm, more than quantization does; pass the checkpoint "
                "that the model was quantized from"
            )
        return original

    def present(self, target: Target) -> Float[Tensor, "*experts out in"]:
        """The weight that the module computes with. Float weights have the module's dtype.

        Raises:
            ValueError: the weight is not loaded, and no checkpoint was passed.
        """
        if target.name in self._gathered:
            return self._gathered[target.name]
        module = self._module(target)
        kept = stored_weight(module, target.matrix)
        if not kept.is_meta:
            return _of_expert(known_format(module).read(module, target.matrix), target)
        if is_offloaded(module):
            stored = offloaded_weight(module, target.matrix)
        elif self.originals is not None:
            stored = self.originals.weight(stored_name(self.originals, target), target.expert)
        else:
            raise _nowhere(target)
        stored = stored.to(factor_device(module, target.matrix), kept.dtype)
        return self._as_matrix(target, stored)

    def is_sharded(self, target: Target) -> bool:
        """Whether reading the weight needs all ranks that hold a part of it."""
        return is_sharded(stored_weight(self._module(target), target.matrix))

    def is_everywhere(self, target: Target) -> bool:
        """Whether each rank of the process group holds a part of a sharded weight."""
        return group_size(stored_weight(self._module(target), target.matrix)) == rank_count()

    def gather(self, target: Target, rank: int | None) -> None:
        """Gather a sharded weight, which `rank` holds until `free`; None for all ranks.

        All ranks must call it. Only `rank` needs memory for a whole weight, except where each rank
        must dequantize its own part: quantizers' tensor subclasses.
        """
        module = self._module(target)
        if rank is None or has_own_scales(stored_weight(module, target.matrix)):
            weight = self.present(target)
            if rank not in (None, rank_number()):
                return
        elif (whole := module_on(module, rank)) is not None:
            weight = _of_expert(known_format(module).read(whole, target.matrix), target)
        else:
            return
        self._gathered[target.name] = weight
        self._fingerprints[target.name] = fingerprint(weight)

    def fingerprint(self, target: Target) -> str:
        """The fingerprint of `present`; all ranks must call it for a sharded weight."""
        if not self.is_sharded(target):
            return fingerprint(self.present(target))
        if target.name not in self._fingerprints:
            self.gather(target, 0 if self.is_everywhere(target) else None)
            self.free()
            self.share_fingerprints()
        return self._fingerprints[target.name]

    def share_fingerprints(self) -> None:
        """Exchange the fingerprints of gathered weights between the ranks."""
        for found in from_ranks(self._fingerprints):
            self._fingerprints |= found

    def free(self) -> None:
        """Free the gathered weights."""
        self._gathered.clear()

    def target_weight(self, target: Target) -> Float[Tensor, "out in"]:
        """The second weight, on the device of the first one.

        Raises:
            ValueError: there is none.
        """
        if self.second is None:
            raise ValueError(
                f"target {target.name!r} has no second weight: pass target_weights=<folder of a "
                "second checkpoint, or of an adapter>"
            )
        return self.second.weight(self, target)

    def oriented(self, target: Target, stored: Tensor) -> Float[Tensor, "*experts out in"]:
        """View a checkpoint's tensor of a target as a matrix."""
        if target.quantized:
            return stored.T if self._stored_transposed(target) else stored
        return self._as_matrix(target, stored)

    def _as_matrix(self, target: Target, stored: Tensor) -> Tensor:
        one = FORMATS[target.module_type]
        if one.operation != "routed":
            return one.orient(stored)
        # Only the module knows the layout, which is that of a stack.
        if stored.ndim == 2:
            return one.stored(self._module(target), stored[None])[0]
        return _of_expert(one.stored(self._module(target), stored), target)

    def _module(self, target: Target) -> nn.Module:
        """The target module; for an adapted layer, its base layer."""
        module = self.model.get_submodule(target.module)
        return getattr(module, "base_layer", module)

    def _is_unloaded(self, target: Target) -> bool:
        return is_unloaded(self._module(target), target.matrix)

    def _check_stored(self, originals: OriginalWeights, targets: list[Target]) -> None:
        """Raise if the checkpoint lacks one of these weights or has one of another shape."""
        found: dict[str, str] = {}
        for target in targets:
            name, wanted = stored_name(originals, target), self._stored_shape(target)
            shape, key = originals.shape(name), originals.key(name)
            source = "that the model was quantized from" if target.quantized else "of this model"
            if shape != wanted:
                raise ValueError(
                    f"original_weights: the weight of {target.name!r} is {shape} there and "
                    f"{wanted} in the model; pass the checkpoint {source}"
                )
            if key in found and not target.shared_with:
                raise ValueError(
                    f"original_weights: {found[key]!r} and {target.name!r} both find {key!r}; pass "
                    f"the checkpoint {source}"
                )
            found[key] = target.name

    def _stored_shape(self, target: Target) -> tuple[int, ...]:
        if not target.quantized:
            return tuple(getattr(self._module(target), target.matrix).shape)
        return target.shape[::-1] if self._stored_transposed(target) else target.shape

    def _stored_transposed(self, target: Target) -> bool:
        """Whether the checkpoint stores (in, out): a Conv1D that transformers quantized."""
        source = getattr(self._module(target), "source_cls", None)
        return source is not None and source.__name__ == "Conv1D"


def _of_expert(weight: Tensor, target: Target) -> Tensor:
    """The matrix of a target's expert; the whole weight if the target has no expert number."""
    return weight if target.expert is None else weight[target.expert]


def _nowhere(target: Target) -> ValueError:
    return ValueError(
        f"target {target.name!r}: its weight is on the meta device (not loaded, or offloaded by "
        "other means than Accelerate's hook on its own module); pass original_weights=<the model's "
        "folder of safetensors>, from which weights are read one at a time, or load the model into "
        "memory first"
    )
