"""Gradients of the loss with respect to the targeted weights, summed layer by layer.

For every targeted layer, with L_b the loss of batch b,

    G = 1/N sum_b dL_b / dW    (out, in), float32.

A layer computes y = W x (+ bias), so dL/dW = sum g xᵀ over all positions, with g = dL/dy. When the
backward pass reaches a layer, g xᵀ is added to the layer's sum, and x and g are released. This
differs from `Parameter.grad`:

- Parameters do not need `requires_grad` and get no `grad`. Packed weights (bitsandbytes) are
  supported: G is the gradient with respect to the dequantized weight.
- For a tied weight, G covers only this layer's use of it, which is what its adapter can change.
- For a layer that is called several times, G sums over the calls.
- The gradients of experts and routers come from autograd, in the parameter's dtype. Where the
  outputs' moments of experts are collected, their modules run the forward pass of `lora_init`.
- Other products and all sums are float32 (float64 for float64 models), whatever dtype the model
  computes in.

One definition of the mean holds for all methods: L_b is the loss that the model, or `WithLoss`,
returns for batch b, usually the mean over its labels, and every batch has the same weight. The
output moments use the same L_b,

    y = 1/tokens sum over batches and positions of g²    (out,), float64,

with the tokens that the moments of the layer's inputs count. Where L_b is a mean, g shrinks with
the number of labels in a batch, and y with its square: use batches of one example for the values of
a paper that has them. Both come from one backward pass.

Memory: the sums take 4 bytes per weight, and the activations of one batch stay, as in training. One
layer's gradient is added where the sums are on another device or the model is float64.

The model runs in eval mode: without dropout, G does not depend on a random state. transformers
checkpoints activations in training mode only. Where checkpointing is enabled, the checkpointing
modules are set to training mode, but not their submodules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lora_init.calibration.batches import check_count, forward, home, moved
from lora_init.calibration.hooks import Observer, restore_training
from lora_init.calibration.places import Place, placed
from lora_init.distributed import all_or_none, over_ranks
from lora_init.layers.routed_product import routed_call
from lora_init.linalg.matrix import refuse_non_finite, widened
from lora_init.linalg.mixed_products import add_product
from lora_init.linalg.precision import full_precision, wide, wide_device
from lora_init.linalg.transfer import on_host
from lora_init.weights.kinds import known_format


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of the model's output, which transformers models compute from labels.

    Raises:
        ValueError: the output has no attribute `loss`, or it is None.
    """
    output = forward(model, batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        fields = f" of {', '.join(batch)}" if isinstance(batch, dict) else ""
        raise ValueError(
            f"calibration: gradients need a loss, and for a batch{fields} the model returned a "
            f"{type(output).__name__} without one; pass batches with labels, e.g. "
            "{'input_ids': …, 'attention_mask': …, 'labels': …}, or "
            "calibration=lora_init.WithLoss(batches, loss)"
        )
    return loss


def collect_gradients(
    model: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Tensor] = own_loss,
    device: torch.device | None = None,
    observer: Observer | None = None,
    squares: dict[str, Float[Tensor, " out"]] | None = None,
    factors: Mapping[str, Factor] | None = None,
) -> dict[str, Tensor]:
    """Run `batches` forward and backward and return each layer's mean gradient.

    Every batch has the same weight, whatever its number of labels. Under `torch.distributed` every
    rank may pass different batches. Sums and counts are reduced, and all ranks get the same G.

    Args:
        model: the base model without an adapter. Training flags and random states are restored.
            Its parameters are not changed.
        names: qualified names of linear layers or convolutions.
        batches: any iterable, as for `lora_init.calibration.collect.collect`.
        loss: ``(model, batch) -> loss``, a scalar. The default is the loss that the model returns.
        device: where the sums are stored. None stores them where the layers compute.
        observer: sums the inputs of the layers in the same forward passes.
        squares: filled with the sums of g² over all positions and ranks, by name.
        factors: by name, what multiplies a layer's G; the products are returned instead of G.

    Returns:
        G by name, (out, in), float32; or its product with the layer's factor.

    Raises:
        ValueError: no batch was passed, a loss is not a finite scalar, a layer is never reached, or
            a gradient is not finite. The message names the layer if one is the cause.
        RuntimeError: another rank failed. torch raises it too if a layer's input is modified before
            the backward pass, or for reentrant checkpointing (use_reentrant=False is supported).
    """
    places = placed(model, names)
    fused = _fused(places)
    sums = _Sums(places, device, factors, with_squares=squares is not None)
    place = home(model)
    count = 0
    observed = nullcontext() if observer is None else observer.observing(model)
    with (
        all_or_none("gradients"),
        observed,
        _tapped(model, places, sums.add) as anchor,
        _trained(fused, sums.add_fused),
        nullcontext() if squares is None else _watched(places, sums.add_squares),
    ):
        for count, batch in enumerate(batches, start=1):
            with nullcontext() if observer is None else observer.batch(batch):
                value = loss(model, moved(batch, place))
            _check_loss(value, count, places)
            if value.requires_grad:
                # Only towards the anchor and these parameters: no other gradient is computed.
                value.backward(inputs=[anchor, *fused])
    means = sums.mean(count, place)
    if squares is not None:
        for name, mean in means.items():
            own = sums.squares.get(name)
            zeros = torch.zeros(len(mean), dtype=torch.float64, device=mean.device)
            squares[name] = over_ranks(zeros if own is None else own.to(mean.device))
    return means


@dataclass(frozen=True)
class Factor:
    """A block X that multiplies a layer's gradient: G X (out, k), or Gᵀ X (in, k) if transposed.

    The product is summed position by position, so G is never formed.
    """

    block: Float[Tensor, "size k"]
    transposed: bool

    def shape(self, weight: tuple[int, int]) -> tuple[int, int]:
        """The shape of the product, for a weight (out, in)."""
        return weight[1 if self.transposed else 0], self.block.shape[1]

    def product(
        self, outputs: Float[Tensor, "positions out"], inputs: Float[Tensor, "positions in"]
    ) -> Float[Tensor, "rows k"]:
        """The part of the product that these positions contribute."""
        left, right = (inputs, outputs) if self.transposed else (outputs, inputs)
        wide = torch.promote_types(widened(left).dtype, self.block.dtype)
        block = self.block.to(left.device, wide)
        return left.to(wide).mT @ (right.to(wide) @ block)


class _Sums:
    """One sum per layer, created when the backward pass first reaches the layer."""

    def __init__(
        self,
        places: Mapping[str, Place],
        device: torch.device | None,
        factors: Mapping[str, Factor] | None = None,
        *,
        with_squares: bool = False,
    ) -> None:
        self.places = places
        self.device = device
        self.factors = factors
        self.with_squares = with_squares
        self.squares: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add g xᵀ of one call of a layer."""
        module = self.places[name].module
        # A layer at a boundary of the device map moves its input in its forward pass.
        stored = known_format(module)
        inputs = stored.input_rows(module, x).to(gradient.device)
        outputs = stored.output_rows(module, gradient)
        if name not in self._sums:
            self._sums[name] = self._zeros(name, gradient.device)
        if self.with_squares:
            # Squares of a mean loss's gradients underflow float32.
            found = wide(outputs).square().sum(0)
            self.squares[name] = self.squares[name].add_(found) if name in self.squares else found
        total = self._sums[name]
        with full_precision():
            if (groups := stored.groups(module)) > 1:
                inputs = widened(inputs).unflatten(0, (-1, groups))
                outputs = widened(outputs).unflatten(1, (groups, -1))
                total += torch.einsum("pgo,pgi->goi", outputs, inputs).flatten(0, 1).to(total)
            elif self.factors is not None:
                total += self.factors[name].product(outputs, inputs).to(total)
            elif total.device == gradient.device and inputs.dtype == outputs.dtype != torch.float64:
                add_product(total, outputs.mT, inputs)
            else:
                total += (widened(outputs).mT @ widened(inputs)).to(total)

    def add_fused(
        self, names: Mapping[int | None, str], gradient: Float[Tensor, "*experts m n"]
    ) -> None:
        """Add the gradient of a parameter, as its module stores it, expert by expert."""
        place = self.places[next(iter(names.values()))]
        matrices = known_format(place.module).stored(place.module, gradient)
        for expert, name in names.items():
            own = matrices if expert is None else matrices[expert]
            if name not in self._sums:
                self._sums[name] = self._zeros(name, gradient.device)
            if self.factors is not None:
                factor = self.factors[name]
                own = widened(own.mT if factor.transposed else own)
                with full_precision():
                    own = own @ factor.block.to(own.device, own.dtype)
            self._sums[name] += own.to(self._sums[name])

    def add_squares(
        self,
        names: Mapping[int, str],
        gradient: Float[Tensor, "positions out"],
        experts: Int[Tensor, " positions"],
    ) -> None:
        """Add g² of the outputs of one matrix of all experts, each position to its expert."""
        found = wide(gradient).square()
        count = len(self.places[next(iter(names.values()))].parameter)
        total = found.new_zeros(count + 1, found.shape[1])
        total.index_add_(0, experts.to(found.device), found)
        for expert, name in names.items():
            before = self.squares.get(name)
            self.squares[name] = total[expert] if before is None else before + total[expert]

    def _zeros(self, name: str, place: torch.device) -> Tensor:
        shape = self.places[name].shape
        if self.factors is not None:
            shape = self.factors[name].shape(shape)
        return torch.zeros(shape, dtype=torch.float32, device=wide_device(self.device or place))

    def mean(self, count: int, place: torch.device) -> dict[str, Tensor]:
        """Divide the sums over the batches of all ranks by the number of batches.

        Args:
            count: number of batches on this rank.
            place: device of the zero sums of layers that no batch on this rank has reached.
        """
        reached = [name in self._sums for name in self.places]
        tally = over_ranks(torch.tensor([count, *reached], device="cpu")).tolist()
        check_count(tally[0])
        means = {}
        for name, reaching in zip(self.places, tally[1:], strict=True):
            if not reaching:
                raise ValueError(
                    f"calibration: no gradient reached the target {name!r}; exclude it "
                    "(exclude_modules) or pass batches whose loss depends on it"
                )
            total = self._sums.pop(name, None)
            if total is None:
                total = self._zeros(name, place)
            means[name] = over_ranks(total).div_(tally[0])
        _check_finite(means)
        return means


def _check_finite(means: Mapping[str, Tensor]) -> None:
    """Raise if a gradient is not finite. Waits for each device once."""
    # A norm needs no extra memory. It can overflow float32 although all entries are finite.
    norms = [torch.linalg.vector_norm(mean) for mean in means.values()]
    for (name, mean), norm in zip(means.items(), on_host(norms), strict=True):
        if not math.isfinite(norm) and not bool(mean.isfinite().all()):
            raise ValueError(
                f"calibration: the gradient of {name!r} is not finite; check the batches, the "
                "model's weights, and its dtype (float16 overflows at 65504)"
            )


def _check_loss(loss: Any, number: int, places: Mapping[str, Place]) -> None:
    """Raise if the loss is not a finite scalar; batch numbers start at 1.

    If a layer's weight is not finite, the message names it.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise ValueError(
            f"calibration: the loss of batch {number} is a {type(loss).__name__}{shape}; it must "
            "be a tensor with one entry: take its mean"
        )
    if not bool(torch.isfinite(loss)):
        for name, place in places.items():
            module, one = place.module, known_format(place.module)
            if not (place.parameter.is_meta or one.unreadable(module) or one.opaque(module)):
                refuse_non_finite(name, place.weight)
        raise ValueError(
            f"calibration: the loss of batch {number} is {loss.item()}; labels that are all "
            "ignored (-100) give nan: drop such batches, or check the model's weights"
        )


class _Tap(torch.autograd.Function):
    """The identity y -> y. Its backward pass reports x and the gradient with respect to y.

    The anchor makes y require a gradient where no parameter does. `backward` runs towards it.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, y: Tensor, x: Tensor, add: Callable) -> Tensor:
        # Autograd raises if a saved x was modified later. Checkpointing can recompute x instead of
        # storing it.
        ctx.save_for_backward(x)
        ctx.add = add
        return y.clone()  # in-place operations such as nn.ReLU(inplace=True) reject a view of y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.add(x, gradient)
        return None, gradient, None, None


@contextmanager
def _tapped(
    model: nn.Module, places: Mapping[str, Place], add: Callable[[str, Tensor, Tensor], None]
) -> Iterator[Tensor]:
    """Register hooks, set eval mode and enable gradients, all temporarily; yields the anchor."""
    anchor = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)

    def tap(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor:
            x: Any = args[0] if args else kwargs.get("input", kwargs.get("x"))
            return _Tap.apply(anchor, y, x.detach(), lambda *pair: add(name, *pair))

        return hook

    with ExitStack() as undo:
        restore_training(model, undo)
        for name, place in places.items():
            if not place.has_own_forward:
                handle = place.module.register_forward_hook(tap(name), with_kwargs=True)
                undo.callback(handle.remove)
        for module in model.modules():
            module.training = getattr(module, "gradient_checkpointing", False) is True
        with torch.random.fork_rng(_accelerators(model)), torch.enable_grad():
            yield anchor


def _fused(places: Mapping[str, Place]) -> dict[nn.Parameter, dict[int | None, str]]:
    """The names of experts' matrices by number for each fused parameter; None for a router's."""
    found: dict[nn.Parameter, dict[int | None, str]] = {}
    for name, place in places.items():
        if place.has_own_forward:
            parameter: Any = place.parameter
            found.setdefault(parameter, {})[place.expert] = name
    return found


@contextmanager
def _trained(
    fused: Mapping[nn.Parameter, Mapping[int | None, str]], add: Callable[[Mapping, Tensor], None]
) -> Iterator[None]:
    """Let backward passes report the gradients of these parameters and free them one by one.

    Autograd computes them, in the dtype of the parameters.
    """

    def hook(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        add(fused[parameter], gradient)

    with ExitStack() as undo:
        for parameter in fused:
            undo.callback(setattr, parameter, "grad", parameter.grad)
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.grad = None
            parameter.requires_grad_(True)
            undo.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
        yield


@contextmanager
def _watched(
    places: Mapping[str, Place], add: Callable[[Mapping[int, str], Tensor, Tensor], None]
) -> Iterator[None]:
    """Let the backward pass report the gradients of the outputs of each expert's matrices.

    The modules of experts run the forward pass that they have with an adapter, without an update.
    """
    readers: dict[nn.Module, dict[str, dict[int, str]]] = {}
    for name, place in places.items():
        if place.expert is not None:
            matrices = readers.setdefault(place.module, {})
            matrices.setdefault(place.matrix, {})[place.expert] = name

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        def watch(matrix: str, states: Tensor, experts: Tensor) -> None:
            if (names := readers[module].get(matrix)) and states.requires_grad:
                states.register_hook(lambda gradient: add(names, gradient, experts))

        return routed_call(module, {}, args, kwargs, watch)

    with ExitStack() as undo:
        for module in readers:
            own = vars(module).get("forward")
            module.forward = partial(forward, module)
            if own is not None:
                undo.callback(partial(setattr, module, "forward", own))
            undo.callback(partial(delattr, module, "forward"))
        yield


def _accelerators(model: nn.Module) -> list[torch.device]:
    """The GPUs that a model computes on."""
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
