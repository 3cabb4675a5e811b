"""The weights of a model with a second adapter, for methods that start from a difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.adapters.format import own_channels
from lora_init.adapters.load import read
from lora_init.config.file import CONFIG_NAME
from lora_init.factors import block_matrix
from lora_init.linalg.precision import wide
from lora_init.plan.plan import Target
from lora_init.registry import Initializer
from lora_init.weights.second import SecondCheckpoint, SecondWeights
from lora_init.weights.source import BaseWeights


def second_weights(
    model: nn.Module, source: str | PathLike | Mapping[str, Tensor] | None, spec: Initializer
) -> SecondWeights | None:
    """The second weights for a method that reads them: a checkpoint's, or those of an adapter.

    Args:
        model: the base model of the adapter; it is not changed.
        source: a folder with `adapter_config.json`, or as for `SecondCheckpoint`.
        spec: the method.

    Returns:
        None for a method that reads no second weight.

    Raises:
        FileNotFoundError, ValueError, TypeError: the source cannot be read or does not fit; or it
            is missing, or the method does not read it.
    """
    if "target_weight" not in spec.reads:
        if source is None:
            return None
        raise ValueError(
            f"target_weights is not supported with init_lora_weights={spec.name!r}: this method "
            "does not read them. Leave them out"
        )
    if source is None:
        raise ValueError(
            f"init_lora_weights={spec.name!r} needs a second weight of each layer: pass "
            "target_weights=<folder of a second checkpoint, or of an adapter>"
        )
    if isinstance(source, str | PathLike) and (Path(source) / CONFIG_NAME).is_file():
        return SecondAdapter(model, Path(source))
    return SecondCheckpoint(source)


class SecondAdapter(SecondWeights):
    """The weights W0 + s B A of an adapter on the same base model.

    Trained biases and fully trained modules of the adapter are not used.

    Args:
        model: the base model.
        folder: the folder of the adapter, from this package or PEFT.

    Raises:
        FileNotFoundError, ValueError: as `lora_init.adapters.read`; or the adapter is more than a
            low-rank change of the weights: DoRA, or a replaced base.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.folder = folder
        loaded = read(folder, model, torch.float32)
        if loaded.plan.use_dora or loaded.plan.replaced:
            reason = "it uses DoRA" if loaded.plan.use_dora else "it replaces the base"
            raise ValueError(
                f"target_weights={str(folder)!r} is not supported: {reason}, so the change "
                "of its weights has no low rank. Pass a checkpoint of the merged model"
            )
        # Both factors of s B A, and of s B0 A0 where the adapter subtracts it.
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for target in loaded.plan.targets:
            trained = loaded.parts[target.name]
            if own_channels(target, trained["lora_A"]) is not trained["lora_A"]:
                raise ValueError(
                    f"target_weights={str(folder)!r} is not supported: PEFT has trained the lora_A "
                    f"of {target.name!r} for the channels of all groups, so the change is not a "
                    "grouped weight. Leave this layer out"
                )
            lora_A = [trained["lora_A"]]
            lora_B = [block_matrix(trained["lora_B"], target.groups)]
            if loaded.plan.initializer.base == "subtract":
                initial = loaded.factors[target.name]
                lora_A.append(initial.lora_A.to(lora_A[0].device))
                lora_B.append(-initial.lora_B.to(lora_B[0].device))
            scaled = target.scaling * torch.cat(lora_B, dim=-1).double()
            joined = torch.cat(lora_A, dim=-2).double()
            for one in target.single():
                of_one = ... if one.expert is None else one.expert
                self._pairs[one.name] = joined[of_one], scaled[of_one]

    def check(self, weights: BaseWeights, targets: Sequence[Target]) -> None:
        missing = [target.name for target in targets if target.name not in self._pairs]
        if missing:
            raise ValueError(
                f"target_weights={str(self.folder)!r}: the adapter has nothing for "
                f"{missing[0]!r} and {len(missing) - 1} other targets; choose its target_modules, "
                f"such as {next(iter(self._pairs))!r}"
            )

    def weight(self, weights: BaseWeights, target: Target) -> Float[Tensor, "out in"]:
        first = wide(weights.weight(target))
        lora_A, lora_B = (part.to(first.device) for part in self._pairs[target.name])
        # In float64, so that the difference from W0 is s B A without W0's rounding.
        return torch.addmm(first, lora_B, lora_A)
