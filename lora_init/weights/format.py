"""The contract of a weight format: how a type of module stores its weight.

The rest of the package sees a weight as one or more named matrices:

| format | stored as | read as |
|---|---|---|
| Linear | (out, in) | itself |
| Conv1D (transformers) | (in, out) | its transpose |
| Embedding | (entries, width) | its transpose: out = width, in = entries, for one-hot inputs |
| Conv1d, Conv2d, Conv3d | (out, channels, *kernel) | (out, channels·kernel size), for patches |
| ConvTranspose1d, 2d, 3d | (channels, out, *kernel) | (out, channels·kernel size), for patches |
| grouped convolution | (out, channels of a group, *kernel) | the matrices of the groups, stacked |
| Experts | (experts, out, in), or (experts, in, out) | (experts, out, in), a stack |
| Router | (experts, in) | itself |
| Linear4bit, Linear8bitLt | packed codes and scales | the dequantized matrix, float32 |
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.entry_points import EntryPoints
from lora_init.quantization.quantizer import Quantizer
from lora_init.weights.promise import Promising

WEIGHT = "weight"
"""The name of the matrix of a module that has only one."""

Operation = Literal["product", "convolution", "lookup", "routed", "selection"]
"""How a module applies its matrix: to rows of features, to patches, by looking up columns, for
experts to the rows that a router selects, or in a router's own forward pass."""

Subtraction = Literal["edit", "in_forward", "requantize"]
"""How a format subtracts s B0 A0: from the stored weight, in the forward pass, or by quantizing."""

Matrix = Float[Tensor, "*experts out in"]


@dataclass(frozen=True)
class Held:
    """A weight before it was replaced, to restore it exactly. It holds references, not copies.

    Attributes:
        parameter: the parameter object. A tied one stays in use in the other module.
        data: the parameter's data, or a CPU copy of it.
        name: the name of the matrix.
        state: what the format stores in addition, such as scales.
    """

    parameter: nn.Parameter
    data: Tensor
    name: str = WEIGHT
    state: Any = None


@dataclass(frozen=True)
class Finding:
    """The result of a probe of a module's forward.

    Attributes:
        reason: why the function is not the product; None if it is.
        is_close: whether the function is the product up to a typical quantization error.
    """

    reason: str | None
    is_close: bool


class WeightFormat(Promising, ABC):
    """How one type of module stores its weight. An instance has no state.

    What its functions return is checked; see `lora_init.weights.promise`.

    A matrix is (out, in), or (experts, out, in) where one tensor holds those of all experts.

    Attributes:
        name: the module type, as in plans and tables.
        operation: how the module applies its matrix: "product" with rows of features,
            "convolution" with patches, "lookup" of its columns, "routed", a product of each
            expert's matrix with the rows that a router selects, or "selection", a product inside a
            router's forward pass. It selects the adapted layer.
        subtractions: the supported ways to subtract s B0 A0, the default first: "edit" the stored
            weight, subtract "in_forward", or "requantize" the difference. A format with only
            "in_forward" need not support `write`.
        quantized: whether `read` dequantizes, and `write` quantizes.
        readable: whether `read` is supported; see `opaque` for single modules.
        writable: whether `write`, `hold` and `put_back` are supported; see `unwritable`.
        transposed: whether the weight is stored as (in, out).
    """

    name: str
    operation: ClassVar[Operation] = "product"
    subtractions: ClassVar[tuple[Subtraction, ...]]
    quantized: ClassVar[bool] = False
    readable: ClassVar[bool] = True
    writable: ClassVar[bool] = True
    transposed: ClassVar[bool] = False

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether the class of the module or of its weight tensor has this format.

        The dtype never decides.
        """

    def refusal(self, module: nn.Module) -> str | None:
        """Why a module that matches cannot have an adapter; None if it can.

        The text continues a sentence, as in "target 'x' is an Embedding with max_norm=1, which …".
        """
        return None

    def replaced_forward(self, module: nn.Module) -> Finding | None:
        """Probe a forward that was set on the instance; None if there is none."""
        return None

    def groups(self, module: nn.Module) -> int:
        """How many blocks of rows of the matrix have their own inputs: a convolution's groups."""
        return 1

    def matrices(self, module: nn.Module) -> tuple[str, ...]:
        """The names of the module's matrices."""
        return (WEIGHT,)

    @abstractmethod
    def shape(self, module: nn.Module, name: str = WEIGHT) -> tuple[int, ...]:
        """The shape that `read` returns. Reads no data, so it works on the meta device too."""

    def unreadable(self, module: nn.Module, name: str = WEIGHT) -> str | None:
        """Why `read` would fail, for example "it is not quantized yet"; None if it works."""
        return None

    def opaque(self, module: nn.Module) -> str | None:
        """Why the values can never be read, whatever the user does; None if they can.

        Such a module still supports methods that only draw random factors or read inputs. The text
        continues a sentence, as in "its weight cannot be read, because …".
        """
        return None if self.readable else f"{self.name} has no dequantizer here"

    def unwritable(self, module: nn.Module) -> str | None:
        """Why `write` is not supported; None if it is."""
        return None if self.writable else "its packed weight is read-only"

    @abstractmethod
    def read(self, module: nn.Module, name: str = WEIGHT) -> Matrix:
        """The matrix: a view in the module's dtype, or dequantized values in float32."""

    @abstractmethod
    def write(
        self, module: nn.Module, weight: Matrix, name: str = WEIGHT, *, own: bool = False
    ) -> None:
        """Store a new matrix in new memory, so that `put_back` can restore the present one.

        Args:
            weight: of any float dtype, on any device.
            own: create a new parameter, because another module uses the present one too.
        """

    @abstractmethod
    def hold(self, module: nn.Module, name: str = WEIGHT, *, on_cpu: bool = False) -> Held:
        """Record a weight that is about to be replaced.

        Args:
            on_cpu: copy a float weight to CPU memory, for long storage. Packed weights stay on
                their device because they are small. The parameter object is kept in any case.
        """

    @abstractmethod
    def put_back(self, module: nn.Module, held: Held) -> None:
        """Restore a recorded weight on the module's present device. It may be called twice."""

    def orient(self, stored: Tensor) -> Matrix:
        """View a tensor in the layout of the module's weight as a matrix."""
        return stored

    def stored(self, module: nn.Module, weight: Matrix) -> Tensor:
        """The inverse of `orient`. Matrices of packed modules stay as they are."""
        return weight

    def float_dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of the weight, or the one from which it was quantized."""
        return getattr(module, WEIGHT).dtype

    def describe(self, module: nn.Module) -> str:
        """The weight's dtype, or the format of a packed weight, e.g. "nf4/64"."""
        return str(self.float_dtype(module)).removeprefix("torch.")

    def quantizer(self, module: nn.Module) -> Quantizer | None:
        """The quantizer whose ``roundtrip(w)`` is what `read` returns after `write`, or None.

        Raises:
            ValueError: the weight is not quantized (yet).
        """
        return None

    def changes_in_forward(self, module: nn.Module) -> bool:
        """Whether a forward pass may change how the weight is stored, until `keep_plain`."""
        return False

    def blocks_gradient(self, module: nn.Module) -> bool:
        """Whether the forward pass rounds its inputs, and gives them no gradient."""
        return False

    def keep_plain(self, module: nn.Module) -> None:
        """Prevent forward passes from changing how the weight is stored."""
        return

    def input_rows(self, module: nn.Module, x: Tensor) -> Float[Tensor, "positions in"]:
        """The vectors that the matrix is multiplied by: tokens, or patches.

        With groups, each position has one vector for each group.
        """
        return x.reshape(-1, x.shape[-1])

    def output_rows(self, module: nn.Module, y: Tensor) -> Float[Tensor, "positions out"]:
        """The vectors of the output, or of its gradient, in the order of `input_rows`."""
        return y.reshape(-1, y.shape[-1])

    def reading(self, module: nn.Module) -> Hashable:
        """A key for how `input_rows` cuts an input. Modules with equal keys read the same rows."""
        return None


def sizes(module: nn.Module) -> tuple[int, int]:
    """The (out, in) of a linear module, which states them as torch's does."""
    linear = cast(nn.Linear, module)
    return linear.out_features, linear.in_features


def class_names(module: nn.Module) -> frozenset[str]:
    """The names of the module's class and its base classes."""
    return _names_of(type(module))


@functools.lru_cache(maxsize=1024)
def _names_of(kind: type) -> frozenset[str]:
    return frozenset(cls.__name__ for cls in kind.__mro__)


FORMATS: dict[str, WeightFormat] = {}
"""The registered formats by module type. `register_weight_format` adds one."""

_ENTRY_POINTS = EntryPoints("lora_init.weight_formats")


def register_weight_format(one: WeightFormat) -> None:
    """Add a format. A module that several formats match has the one that was added last.

    Other packages name the module that calls this in the entry-point group
    ``lora_init.weight_formats``.

    Raises:
        TypeError: `one` is not an instance of a subclass of `WeightFormat`.
        ValueError: an attribute of the format is missing or unknown, or another format has its
            name.
    """
    if not isinstance(one, WeightFormat):
        raise TypeError(
            f"weight format {one!r} is not supported: must be an instance of a subclass of "
            "lora_init.weights.format.WeightFormat. Pass an instance, as in MyFormat()."
        )
    name = getattr(one, "name", None)
    if not isinstance(name, str) or not name:
        raise _wrong(one, "name", name, "the name of the module type")
    if one.operation not in get_args(Operation):
        raise _wrong(one, "operation", one.operation, f"one of {', '.join(get_args(Operation))}")
    subtractions = getattr(one, "subtractions", None)
    if not subtractions or not set(subtractions) <= set(get_args(Subtraction)):
        known = f"a tuple of some of {', '.join(get_args(Subtraction))}"
        raise _wrong(one, "subtractions", subtractions, known)
    if name in FORMATS:
        former = type(FORMATS[name]).__name__
        raise _wrong(one, "name", name, f"a new name, because {former} has this one")
    FORMATS[one.name] = one


def _wrong(one: WeightFormat, attribute: str, value: object, must: str) -> ValueError:
    return ValueError(
        f"{attribute}={value!r} of the weight format {type(one).__name__} is not supported: must "
        f"be {must}. Correct it in the class."
    )


def weight_formats() -> dict[str, WeightFormat]:
    """All formats by module type, including those of other packages."""
    _ENTRY_POINTS.load()
    return FORMATS
