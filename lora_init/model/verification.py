"""Check with one batch that a model uses its adapted layers.

A model may hold a second reference to a layer, in a Python list or a closure. Injection does not
replace such a reference. The model then calls the original module and ignores the adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.calibration.batches import forward, home, moved
from lora_init.layers.experts import AdaptedForward
from lora_init.linalg.precision import wide
from lora_init.plan.tables import listed
from lora_init.weights.sharded import is_dtensor

FLOAT32_TOLERANCE = 1e-4
"""Largest accepted difference of an output, relative to its largest entry. It lies between the
rounding error of a deep model and the error of a missed layer."""


class Uses:
    """A context that records which layers a model uses.

    Args:
        layers: the adapted layers by name.
        bases: the original modules inside them, by the same names.

    Attributes:
        used: names of layers that were called or whose weight was read.
        called: names of layers that were called.
        bypassed: names of layers whose original module was called from elsewhere.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], bases: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.used: set[str] = set()
        self.called: set[str] = set()
        self.bypassed: set[str] = set()
        self._layers = dict(layers)
        self._bases = dict(bases or {})
        self._running: dict[str, int] = dict.fromkeys(layers, 0)
        self._handles: list[Any] = []

    def __enter__(self) -> Uses:
        try:
            for name, layer in self._layers.items():
                self._watch(name, layer)
            for name, base in self._bases.items():
                hook = self._on_base(name)
                self._handles.append(base.register_forward_pre_hook(hook))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self._layers.values():
            layer.__dict__.pop("on_read", None)

    def _watch(self, name: str, layer: Any) -> None:
        def start(*_: Any) -> None:
            self.used.add(name)
            self.called.add(name)
            self._running[name] += 1

        def end(*_: Any) -> None:
            self._running[name] -= 1

        self._handles.append(layer.register_forward_pre_hook(start))
        self._handles.append(layer.register_forward_hook(end, always_call=True))
        if hasattr(type(layer), "on_read"):
            layer.on_read = lambda: self.used.add(name)

    def _on_base(self, name: str) -> Callable:
        def hook(base: nn.Module, *_: Any) -> None:
            # Adapted experts call their module if it has hooks.
            is_adapted = isinstance(vars(base).get("forward"), AdaptedForward)
            if not self._running[name] and not is_adapted:
                self.bypassed.add(name)

        return hook


def verify_adapted(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    bases: Mapping[str, nn.Module],
    batch: Any,
    *,
    expected: Any = None,
    disabled: Callable[[], AbstractContextManager] | None = None,
) -> Uses:
    """Run one batch and raise if the model ignores an adapter.

    The batch runs in eval mode without gradients. Modes and random states are restored. Layers that
    the batch does not use cause a warning.

    Args:
        model: the adapted model.
        layers: its adapted layers by name, from lora_init or PEFT.
        bases: the original modules inside them, by the same names.
        batch: a mapping is passed as ``model(**batch)``, a sequence as ``model(*batch)``.
        expected: the result of `original_output` before injection, for methods that preserve the
            output. If given, the output is compared with it.
        disabled: returns a context in which the adapter is disabled. If given, that output is also
            compared with `expected`.

    Returns:
        The layers that the batch used.

    Raises:
        ValueError: the model called the original module of a layer, or the outputs differ by more
            than 1e-4 of the largest entry, or four times the epsilon of the output's dtype.
    """
    batch = moved(batch, home(model))
    with _undisturbed(model):
        with Uses(layers, bases) as uses:
            output = forward(model, batch)
        if uses.bypassed:
            raise ValueError(bypassed_message([name for name in layers if name in uses.bypassed]))
        if expected is not None:
            _compare(_tensors(output), _tensors(expected))
        if expected is not None and disabled is not None:
            with disabled():
                _compare(_tensors(forward(model, batch)), _tensors(expected))
    unused = [name for name in layers if name not in uses.used]
    if unused:
        warnings.warn(unused_message(unused, len(layers)), stacklevel=3)
    return uses


def original_output(model: nn.Module, batch: Any) -> Any:
    """Compute the output of a model before injection, in eval mode, for `verify_adapted`."""
    batch = moved(batch, home(model))
    with _undisturbed(model):
        return forward(model, batch)


def without_gradient(layers: Mapping[str, nn.Module], output: Any) -> list[str] | None:
    """Names of layers with no trained parameter in the graph of this output.

    Returns:
        None if the graph cannot tell: there is none, a reentrant checkpoint hides a part of it, or
        the parameters of sharded layers have others in their place.
    """
    waiting = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen: set[Any] = set(waiting)
    reached: set[int] = set()
    while waiting:
        node: Any = waiting.pop()
        if "Checkpoint" in type(node).__name__:
            return None
        reached.add(id(getattr(node, "variable", None)))
        following = {one for one, _ in node.next_functions if one is not None} - seen
        seen |= following
        waiting += following
    trained = {
        name: [parameter for parameter in layer.parameters() if parameter.requires_grad]
        for name, layer in layers.items()
    }
    with_any = {name for name, some in trained.items() if not reached.isdisjoint(map(id, some))}
    if not with_any or any(is_dtensor(one) for some in trained.values() for one in some):
        return None
    return [name for name, some in trained.items() if some and name not in with_any]


def is_traced() -> bool:
    """Whether torch.compile or torch.jit traces this code."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def has_compiled_part(model: nn.Module) -> bool:
    """Whether a module is compiled. A hook on a layer inside would cause a recompilation."""
    return any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )


def bypassed_message(names: list[str]) -> str:
    """The error for layers whose original module was called."""
    return (
        f"verify: the model calls the original module of {listed(names, 6)} and ignores its "
        "adapter. It has another reference to the module, for example in a list or a closure. Add "
        "the module to exclude_modules, or change the model to call its attribute."
    )


def unused_message(names: list[str], count: int) -> str:
    """The warning for layers that a forward pass did not use."""
    return (
        f"{len(names)} of {count} adapted layers were not used in the forward pass: "
        f"{listed(names, 6)}. Either this input does not need them (such as an expert without "
        "tokens), or the model has another reference to the original module and ignores the "
        "adapter. Check with get_peft_model(..., verify=<batch>). If the adapter is ignored, add "
        "the layers to exclude_modules."
    )


def no_gradient_message(names: list[str], count: int) -> str:
    """The warning for layers that run and cannot learn."""
    return (
        f"{len(names)} of {count} adapted layers get no gradient from the output of this pass: "
        f"{listed(names, 6)}. The model calls them, but uses what they return for a choice, such "
        "as that of some tokens, or not at all. They do not train: add them to exclude_modules."
    )


def read_message(names: list[str]) -> str:
    """The warning for layers whose weight is read without a call."""
    return (
        f"the model reads the weight of {listed(names, 6)} instead of calling the layer. PEFT and "
        "other loaders ignore an adapter there, so their outputs differ. Load the file with "
        "LoraModel.from_pretrained, or save the merged model."
    )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Use eval mode without gradients; restore modes and random states afterwards."""
    training = {module: module.training for module in model.modules()}
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _compare(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=False):
        if one.shape != other.shape or not one.numel():
            continue
        accepted = max(FLOAT32_TOLERANCE, 4 * torch.finfo(other.dtype).eps)
        one, other = wide(one), wide(other)
        differing = ~((one == other) | (one.isnan() & other.isnan()))  # masked logits are -inf
        size = float(other[other.isfinite()].abs().amax()) if other.isfinite().any() else 0.0
        difference = float((one - other)[differing].abs().amax()) if differing.any() else 0.0
        if not difference <= accepted * size:
            raise ValueError(
                f"verify: the adapted model's output differs from the base model's by "
                f"{difference / size if size else difference:.1e} of its largest entry. It must "
                f"differ by at most {accepted:.1e}, because the method preserves the output. The "
                "model probably uses a target's weight without calling its module. Find that "
                "layer, and add it to exclude_modules."
            )


def _tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, list | tuple):
        return []
    return [tensor for part in output for tensor in _tensors(part)]
