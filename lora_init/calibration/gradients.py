"""Gradients of the loss with respect to the layers' weights, released layer by layer.

For every targeted layer, with L_b the loss of batch b,

    G = 1/N sum_b dL_b / dW    (out, in), float32.

A layer computes y = W x (+ bias), so dL/dW = sum g xᵀ over all positions, g = dL/dy. When the
backward pass reaches a layer, g xᵀ is added to the layer's sum and x and g are let go. Beside
`Parameter.grad` this way

- no parameter needs `requires_grad`, none gets a `grad`, and weights that cannot have one are
  served: for packed codes (bitsandbytes) G is the gradient with respect to the dequantised weight;
- a tied weight's G is that of this layer's use alone, which is what the layer's adapter can change;
- a layer that is called several times sums over its calls;
- products and sums are float32 (float64 for float64 models) whatever the model computes in.

Memory: the sums, 4 bytes a weight; the activations of one batch, as in training; one layer's
gradient where the sums are on another device or the model is float64. The model runs in eval mode:
no dropout, so that G does not depend on a random state. transformers' layers checkpoint
activations in training mode only, so where that is enabled these modules alone, not what they
contain, are in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.calibration.batches import check_count, forward, home, moved
from lora_init.distributed import all_or_none, over_ranks
from lora_init.factors import widened
from lora_init.linalg.matrix import refuse_non_finite
from lora_init.linalg.mixed_products import add_product
from lora_init.linalg.precision import full_precision
from lora_init.linalg.transfer import on_host
from lora_init.weights.kinds import input_rows, module_type, weight_shape


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model itself returns, as transformers' do where the batch holds labels.

    Raises:
        ValueError: its output has no attribute `loss`, or that is None.
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
) -> dict[str, Float[Tensor, "out in"]]:
    """Run `batches` forward and backward and return each layer's mean gradient.

    Every batch weighs the same, however many labels it holds. Under `torch.distributed` sums and
    counts are reduced over the ranks: each may read batches of its own, all get the same G.

    Args:
        model: the base model, not yet changed. Training flags and random states are restored, and
            its parameters never touched.
        names: qualified names of linear layers or convolutions.
        batches: any iterable, as of `lora_init.calibration.collect.collect`.
        loss: ``(model, batch) -> loss``, a scalar; by default the model's own.
        device: where the sums live; None keeps them where the layers compute.

    Returns:
        G by name, float32.

    Raises:
        ValueError: there is no batch, one gives no finite scalar loss (a layer whose weight is to
            blame is named), or a layer is never reached or gets a non-finite gradient (by name).
        RuntimeError: another rank failed; torch's own where a layer's input is written to before
            the backward pass, or checkpointing is reentrant (use_reentrant=False is served).
    """
    modules = {name: model.get_submodule(name) for name in names}
    sums = _Sums(modules, device)
    place = home(model)
    count = 0
    with all_or_none("gradients"), _tapped(model, modules, sums.add) as anchor:
        for count, batch in enumerate(batches, start=1):
            value = loss(model, moved(batch, place))
            _check_loss(value, count, modules)
            if value.requires_grad:
                # Towards the anchor only: autograd computes no gradient of any parameter.
                value.backward(inputs=[anchor])
    return sums.mean(count, place)


class _Sums:
    """One sum a layer, made when the backward pass first reaches it."""

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device | None) -> None:
        self.modules = modules
        self.device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add g xᵀ of one call of a layer."""
        module = self.modules[name]
        # A layer at the boundary of a device map moves its input itself.
        inputs = input_rows(module, x).to(gradient.device)
        outputs = _output_rows(module, gradient)
        if name not in self._sums:
            self._sums[name] = torch.zeros(
                weight_shape(module), dtype=torch.float32, device=self.device or gradient.device
            )
        total = self._sums[name]
        with full_precision():
            if total.device == gradient.device and inputs.dtype == outputs.dtype != torch.float64:
                add_product(total, outputs.mT, inputs)
            else:
                total += (widened(outputs).mT @ widened(inputs)).to(total)

    def mean(self, count: int, place: torch.device) -> dict[str, Tensor]:
        """The sums over the batches of all ranks, divided by their number.

        Args:
            count: batches of this rank.
            place: where the sums of layers live that no batch of this rank has reached.
        """
        reached = [name in self._sums for name in self.modules]
        tally = over_ranks(torch.tensor([count, *reached], device="cpu")).tolist()
        check_count(tally[0])
        means = {}
        for (name, module), reaching in zip(self.modules.items(), tally[1:], strict=True):
            if not reaching:
                raise ValueError(
                    f"calibration: no gradient reached the target {name!r}; exclude it "
                    "(exclude_modules) or pass batches whose loss depends on it"
                )
            total = self._sums.pop(name, None)
            if total is None:
                total = torch.zeros(
                    weight_shape(module), dtype=torch.float32, device=self.device or place
                )
            means[name] = over_ranks(total).div_(tally[0])
        _check_finite(means)
        return means


def _check_finite(means: Mapping[str, Tensor]) -> None:
    """Refuse non-finite gradients by name. Each device is waited for once."""
    # A norm takes no memory. It may leave float32's range where all entries are finite.
    norms = [torch.linalg.vector_norm(mean) for mean in means.values()]
    for (name, mean), norm in zip(means.items(), on_host(norms), strict=True):
        if not math.isfinite(norm) and not bool(mean.isfinite().all()):
            raise ValueError(
                f"calibration: the gradient of {name!r} is not finite; check the batches, the "
                "model's weights, and its dtype (float16 overflows at 65504)"
            )


def _check_loss(loss: Any, number: int, modules: Mapping[str, nn.Module]) -> None:
    """Refuse what is no finite scalar; batches are counted from 1.

    A layer's weight that is the cause is named.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise ValueError(
            f"calibration: the loss of batch {number} is a {type(loss).__name__}{shape}; allowed "
            "is a tensor with one entry: take its mean"
        )
    if not bool(torch.isfinite(loss)):
        for name, module in modules.items():
            if not module.weight.is_meta:
                refuse_non_finite(name, module.weight.detach())
        raise ValueError(
            f"calibration: the loss of batch {number} is {loss.item()}; labels that are all "
            "ignored (-100) give nan: drop such batches, or check the model's weights"
        )


class _Tap(torch.autograd.Function):
    """y -> y, whose backward pass hands over the layer's input and the gradient of its output.

    The anchor makes y need a gradient where no parameter does, and is what `backward` runs towards.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, y: Tensor, x: Tensor, add: Callable) -> Tensor:
        # Saved by autograd, which refuses an x that was written to since, and lets checkpointing
        # compute x again instead of keeping it.
        ctx.save_for_backward(x)
        ctx.add = add
        return y.clone()  # a view of y could not be written to, as nn.ReLU(inplace=True) does

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.add(x, gradient)
        return None, gradient, None, None


@contextmanager
def _tapped(
    model: nn.Module, modules: Mapping[str, nn.Module], add: Callable[[str, Tensor, Tensor], None]
) -> Iterator[Tensor]:
    """Taps in place, eval mode and gradients on, all undone whatever happens; yields the anchor."""
    anchor = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)

    def tap(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor:
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            return _Tap.apply(anchor, y, x.detach(), lambda *pair: add(name, *pair))

        return hook

    training = {module: module.training for module in model.modules()}
    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(tap(name), with_kwargs=True))
        for module in training:
            module.training = getattr(module, "gradient_checkpointing", False) is True
        with torch.random.fork_rng(_accelerators(model)), torch.enable_grad():
            yield anchor
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag


def _accelerators(model: nn.Module) -> list[torch.device]:
    """The devices beside the CPU that a model computes on."""
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


def _output_rows(module: nn.Module, gradient: Tensor) -> Float[Tensor, "positions out"]:
    """The gradient at each of `lora_init.weights.kinds.input_rows`."""
    if module_type(module) != "Conv2d":
        return gradient.reshape(-1, gradient.shape[-1])
    if gradient.ndim == 3:
        gradient = gradient[None]
    return gradient.flatten(2).transpose(1, 2).flatten(0, 1)
