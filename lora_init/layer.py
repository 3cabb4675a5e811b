"""The input of an initializer: one layer, or a stack of layers of one shape."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg.matrix import widened
from lora_init.linalg.moments import (
    GradientSketch,
    InputSets,
    InputStatistics,
    LeadingComponents,
    StackedInputs,
)

if TYPE_CHECKING:
    from lora_init.quantization import Quantizer

Data = TypeVar("Data")

# A method gets what it declares in `reads`, in the form that its options ask for. Type checkers
# cannot know that. To them the data may be anything, so that a method needs no check for None.
if TYPE_CHECKING:
    Inputs = InputStatistics | Any
    Declared: TypeAlias = Data | Any
else:
    Inputs = InputStatistics | LeadingComponents | StackedInputs | InputSets
    Declared = Data | None

STACKED = "stored_weight", "bias", "gradient", "output_moments"
"""The tensors of a layer that a stack combines along a new first dimension."""


@dataclass
class LayerStatistics:
    """The calibration statistics of one layer.

    Attributes:
        inputs: moments of its inputs, if the method reads them; `InputSets` for several sets, and
            `StackedInputs` for a grouped convolution.
        gradient: gradient of the loss with respect to its weight, if the method reads it; a sketch
            if it does not fit into memory.
        output_moments: mean squares of the gradient with respect to each output, if the method
            reads them.
    """

    inputs: Declared[Inputs] = None
    gradient: Declared[Float[Tensor, "out in"] | GradientSketch] = None
    output_moments: Declared[Float[Tensor, " out"]] = None

    def to(self, device: torch.device) -> LayerStatistics:
        """The statistics on `device`; this object if they are there already."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        elsewhere = {
            name: part.to(device)
            for name, part in parts.items()
            if part is not None and part.device != device
        }
        return replace(self, **elsewhere) if elsewhere else self


@dataclass(frozen=True)
class LayerRequest:
    """A layer in the view of a rank allocator.

    Attributes:
        rank: the planned rank.
        shape: (out, in).
        statistics: the statistics that the method requested.
        weight: function that loads the original weight (out, in). Call it for one layer at a time.
    """

    rank: int
    shape: tuple[int, int]
    statistics: LayerStatistics
    weight: Callable[[], Float[Tensor, "out in"]]


@dataclass(frozen=True)
class Layer:
    """One layer, or a stack of layers of one shape, as input of an initializer.

    A function marked with `lora_init.registry.batched` may get a stack. Then the weight, the
    statistics and the factors have a leading dimension, and `names` has one entry per layer.
    Data that the method does not declare in `reads` are None; `weight` then raises an error.

    Attributes:
        names: qualified names of the modules; one name unless it is a stack.
        kind: the module type, such as "Linear" or "Embedding".
        shape: (out, in).
        rank: r of the factors to return.
        scaling: s; the layer adds s B A x.
        seed: the initialization seed.
        stored_weight: W (out, in) or (stack, out, in); 16-bit if the model stores it so, else
            float32.
        bias: b (out,), float32; zeros for a layer without one.
        inputs: moments of the layer's inputs; `InputSets` for a method that reads several sets.
        gradient: gradient of the loss with respect to W, float32, with the shape of W.
        output_moments: diag E[g gᵀ], float64: for each output, the mean square of the gradient of
            the loss with respect to it. `lora_init.calibration.gradients` defines the mean.
        quantizer: the quantizer of a base that is quantized already; None for a float base.
        target_weight: W1 (out, in), the layer's weight in a second checkpoint, in any float dtype.
        planned_rank: r before rank allocation; None without allocation.
        is_stack: whether this is a stack.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    seed: int = 0
    stored_weight: Declared[Float[Tensor, "*stack out in"]] = None
    bias: Declared[Float[Tensor, "*stack out"]] = None
    inputs: Declared[Inputs] = None
    gradient: Declared[Float[Tensor, "*stack out in"]] = None
    output_moments: Declared[Float[Tensor, "*stack out"]] = None
    quantizer: Quantizer | None = None
    target_weight: Declared[Float[Tensor, "out in"]] = None
    planned_rank: int | None = None
    is_stack: bool = False

    @cached_property
    def weight(self) -> Float[Tensor, "*stack out in"]:
        """W in float32, dequantized where the base is quantized.

        Raises:
            AttributeError: the method did not declare that it reads the weight.
        """
        if self.stored_weight is None:
            raise AttributeError(
                "layer.weight is not available: must be declared. Register the method with "
                "reads=('weight', ...)"
            )
        return widened(self.stored_weight).to(torch.float32)

    @cached_property
    def _generators(self) -> tuple[torch.Generator, ...]:
        return tuple(layer_generator(self.seed, name) for name in self.names)

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """One CPU generator per layer, seeded by the initialization seed and the layer's name."""
        return self._generators

    @property
    def generator(self) -> torch.Generator | Any:
        """The layer's generator; for a stack, one generator per layer."""
        return self._generators if self.is_stack else self._generators[0]

    @property
    def is_random(self) -> bool:
        """Whether the method has used a generator, so that its factors depend on the seed."""
        return "_generators" in vars(self)

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading dimensions of weight and factors: (layers,) for a stack, else ()."""
        return (len(self.names),) if self.is_stack else ()

    def members(self) -> list[Layer]:
        """The layers of a stack, one by one."""
        nothing = [None] * len(self.names)
        inputs: Any = self.inputs
        parts = {name: getattr(self, name) for name in STACKED}
        parts["inputs"] = None if inputs is None else inputs.members
        columns = [nothing if found is None else found for found in parts.values()]
        return [
            replace(self, names=(name,), is_stack=False, **dict(zip(parts, row, strict=True)))
            for name, *row in zip(self.names, *columns, strict=True)
        ]


def stacked(layers: Sequence[Layer]) -> Layer:
    """Combine layers of one kind, shape, rank and scaling into a stack."""
    first = layers[0]
    tensors = {
        name: _stack([getattr(one, name) for one in layers])
        for name in STACKED
        if getattr(first, name) is not None
    }
    return replace(
        first,
        names=tuple(one.names[0] for one in layers),
        inputs=None if first.inputs is None else _stacked_inputs([one.inputs for one in layers]),
        is_stack=True,
        **tensors,
    )


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """A stack of tensors of one shape: a view if they are adjacent entries of one, else a copy."""
    first, *rest = tensors
    strides, start = first.stride(), first.storage_offset()
    step = rest[0].storage_offset() - start if rest else 0
    adjacent = step > 0 and all(
        one.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and one.dtype is first.dtype
        and one.stride() == strides
        and one.storage_offset() == start + step * number
        for number, one in enumerate(rest, start=1)
    )
    if not adjacent:
        return torch.stack(list(tensors))
    return first.as_strided((len(tensors), *first.shape), (step, *strides), start)


def _stacked_inputs(members: Sequence[Any]) -> Inputs:
    if not isinstance(members[0], InputSets):
        return StackedInputs(members)
    names = members[0].sets
    return InputSets({name: StackedInputs([one[name] for one in members]) for name in names})


def layer_generator(seed: int, name: str) -> torch.Generator:
    """The CPU generator of the layer `name` under `seed`.

    Its seed is the first 63 bits of SHA-256 of ``"{seed}:{name}"``. So the numbers do not depend on
    the other targets, their order, the device or the process. All draws happen on the CPU, because
    CUDA's generator gives different numbers.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return generator
