"""Formats of modules that store a floating-point weight in one parameter."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor, nn

from lora_init.weights.format import WEIGHT, Finding, Held, Matrix, WeightFormat
from lora_init.weights.offload import HOOK_ATTRIBUTES
from lora_init.weights.probe import probe
from lora_init.weights.sharded import is_sharded, whole, whole_shape

# Probing runs the module and a format is looked up often, so cache one probe per module.
_FINDINGS: weakref.WeakKeyDictionary[nn.Module, Finding] = weakref.WeakKeyDictionary()
_LINEAR_CLASSES: weakref.WeakSet[type] = weakref.WeakSet()


class FloatFormat(WeightFormat):
    """A module of the class `cls` or of a subclass that computes the same function.

    A subclass with its own forward is supported if a probe shows that it computes the product with
    its weight, plus its bias (see `lora_init.weights.probe`).
    """

    cls: type[nn.Module]
    subtractions = "edit", "in_forward"

    def base_class(self, module: nn.Module) -> type[nn.Module] | None:
        """The class of this format from which the module's class derives; None if it does not."""
        return self.cls if isinstance(module, self.cls) else None

    def matches(self, module: nn.Module) -> bool:
        return self.base_class(module) is not None

    def has_own_forward(self, module: nn.Module) -> bool:
        cls = self.base_class(module)
        return cls is not None and type(module).forward is not cls.forward

    def refusal(self, module: nn.Module) -> str | None:
        reason = self._difference(module) if self.has_own_forward(module) else None
        if reason is None:
            return None
        return f"is a {type(module).__name__}, which is not supported: {reason}"

    def replaced_forward(self, module: nn.Module) -> Finding | None:
        """Quantizers set a forward that rounds inputs or weights.

        The wrapper of Accelerate's hooks does not count, because it calls the class's forward.
        """
        if "forward" not in vars(module) or self._weight(module).is_meta:
            return None
        if hasattr(module, HOOK_ATTRIBUTES[0]):
            inner = vars(module).get(HOOK_ATTRIBUTES[1])
            if getattr(inner, "__func__", None) is type(module).forward:
                return None
            return Finding("a forward under Accelerate's hook was set on the instance", False)
        if is_sharded(self._weight(module)):
            return _sharded_finding(module)
        return probe(module, self)

    def _difference(self, module: nn.Module) -> str | None:
        """Why the module's own forward is not known to be the product; None if it is."""
        weight = module._parameters.get(WEIGHT)
        if weight is None or not weight.is_floating_point():
            return "it does not store its weight as a floating-point parameter `weight`"
        if module not in _FINDINGS:
            if weight.is_meta:
                if type(module) in _LINEAR_CLASSES:  # probed already on a loaded module
                    return None
                return (
                    "it has its own forward, and its weight is on the meta device: whether it "
                    "computes a product with its weight cannot be probed"
                )
            if type(weight.data).__name__ not in ("Tensor", "Parameter"):
                return f"it has its own forward, and its weight is a {type(weight.data).__name__}"
            _FINDINGS[module] = probe(module, self)
            if _FINDINGS[module].reason is None:
                _LINEAR_CLASSES.add(type(module))
        reason = _FINDINGS[module].reason
        return None if reason is None else f"it has its own forward, and {reason}"

    def _weight(self, module: nn.Module) -> Tensor:
        """The stored weight of a module that has one matrix."""
        return getattr(module, WEIGHT)

    def shape(self, module: nn.Module, name: str = WEIGHT) -> tuple[int, ...]:
        rows, *columns = whole_shape(getattr(module, name))
        return (columns[0], rows) if self.transposed else (rows, math.prod(columns))

    def unwritable(self, module: nn.Module) -> str | None:
        if is_float8(self._weight(module)):
            return f"its weight is stored in {self.describe(module)}, which would round the sum"
        return None

    def read(self, module: nn.Module, name: str = WEIGHT) -> Matrix:
        """The matrix: a view in the module's dtype, or float32 values of float8 storage."""
        weight = self.orient(whole(getattr(module, name)))
        return weight.float() if is_float8(weight) else weight

    def write(
        self, module: nn.Module, weight: Matrix, name: str = WEIGHT, *, own: bool = False
    ) -> None:
        """The old memory is not written to.

        It may be a checkpoint mapped from disk, which a write would copy page by page, or memory
        that other processes share.
        """
        parameter = getattr(module, name)
        data = self.stored(module, weight).to(parameter.device, parameter.dtype)
        data = data.contiguous().view(parameter.shape)
        if own:
            setattr(module, name, nn.Parameter(data, requires_grad=parameter.requires_grad))
        else:
            parameter.data = data

    def hold(self, module: nn.Module, name: str = WEIGHT, *, on_cpu: bool = False) -> Held:
        parameter = getattr(module, name)
        data = parameter.data
        return Held(parameter, data.to("cpu", copy=True) if on_cpu else data, name)

    def put_back(self, module: nn.Module, held: Held) -> None:
        # A model that was converted in the meantime (half, double) keeps its dtype.
        data = held.data.to(held.parameter.device, held.parameter.dtype)
        if held.parameter.data.data_ptr() != data.data_ptr():
            held.parameter.data = data
        setattr(module, held.name, held.parameter)

    def float_dtype(self, module: nn.Module) -> torch.dtype:
        weight = self._weight(module)
        return torch.float32 if is_float8(weight) else weight.dtype

    def describe(self, module: nn.Module) -> str:
        return str(self._weight(module).dtype).removeprefix("torch.")

    def orient(self, stored: Tensor) -> Matrix:
        return stored.T if self.transposed else stored

    def stored(self, module: nn.Module, weight: Matrix) -> Tensor:
        return weight.T if self.transposed else weight


def is_float8(tensor: Tensor) -> bool:
    """Whether a tensor is stored in 8 bits, which hooks cast for each forward pass.

    diffusers' layerwise casting stores weights so.
    """
    return tensor.is_floating_point() and tensor.itemsize == 1


def _sharded_finding(module: nn.Module) -> Finding | None:
    """Only the forward of transformers' tensor parallelism is known; others cannot be probed."""
    if module.forward.__qualname__.startswith("TensorParallelLayer."):
        return None
    return Finding("its weight is sharded, so this forward cannot be probed", False)
