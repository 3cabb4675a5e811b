"""Find the matrices that a calibration observes: weights of modules, and those of single experts.

The matrix of expert 3 of a fused parameter is called "<module>.<parameter>.3".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from lora_init.weights.format import WEIGHT
from lora_init.weights.kinds import class_format, known_format
from lora_init.weights.offload import stored_weight


@dataclass(frozen=True)
class Place:
    """Where a matrix is.

    Attributes:
        owner: the name of the module.
        module: the module that holds the matrix.
        matrix: its name in the module.
        expert: the number of the expert; None for a module with one matrix.
    """

    owner: str
    module: nn.Module
    matrix: str = WEIGHT
    expert: int | None = None

    @property
    def has_own_forward(self) -> bool:
        """Whether the module's output is more than the product with this matrix."""
        return self.expert is not None or known_format(self.module).operation == "selection"

    @property
    def parameter(self) -> Tensor:
        """The stored weight, of all experts if the module has several."""
        return stored_weight(self.module, self.matrix)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        *_, rows, columns = known_format(self.module).shape(self.module, self.matrix)
        return rows, columns

    @property
    def groups(self) -> int:
        """The number of groups of inputs. Each group has its own statistics."""
        return known_format(self.module).groups(self.module)

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in)."""
        weight = known_format(self.module).read(self.module, self.matrix)
        return weight if self.expert is None else weight[self.expert]


def placed(model: nn.Module, names: Iterable[str]) -> dict[str, Place]:
    """The places of matrices by name.

    Raises:
        AttributeError: the model has no such module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name in names:
        owner, *inside = name.rsplit(".", 2)
        holder = modules.get(owner)
        routed = holder is not None and getattr(class_format(holder), "operation", "") == "routed"
        if name not in modules and holder is not None and routed and inside[-1].isdigit():
            found[name] = Place(owner, holder, inside[0], int(inside[1]))
        else:
            found[name] = Place(name, model.get_submodule(name))
    return found
