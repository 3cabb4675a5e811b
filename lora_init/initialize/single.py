"""Initial factors of one weight matrix, or of a stack of them, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.factors import Factors
from lora_init.initialize.checks import (
    check_shapes,
    refuse_non_finite_factors,
    warn_of_concerns,
)
from lora_init.initialize.stack import member_data, member_name, stacked_factors
from lora_init.layer import Inputs, Layer, LayerStatistics
from lora_init.linalg.matrix import refuse_non_finite
from lora_init.linalg.mixed_products import is_narrow
from lora_init.linalg.moments import InputSets, InputStatistics, LeadingComponents, StackedInputs
from lora_init.linalg.precision import full_precision, wide, wide_device
from lora_init.plan.check import check_target_rank
from lora_init.quantization import Quantizer
from lora_init.registry import Initializer, Options, build_options, resolve


def init_factors(
    weight: Float[Tensor, "*stack out in"],
    method: str | bool | Mapping[str, Any] | Options = "pissa",
    *,
    r: int,
    lora_alpha: float | None = None,
    use_rslora: bool = False,
    options: Mapping[str, Any] | None = None,
    inputs: Float[Tensor, "*stack tokens in"] | Inputs | Mapping[str, Any] | Sequence | None = None,
    gradient: Float[Tensor, "*stack out in"] | None = None,
    output_moments: Float[Tensor, "*stack out"] | None = None,
    target_weight: Tensor | None = None,
    bias: Float[Tensor, "*stack out"] | None = None,
    quantizer: Quantizer | None = None,
    seed: int = 0,
    name: str | None = None,
    device: str | torch.device | None = None,
) -> Factors:
    """Compute the initial factors of one weight matrix, or of a stack of matrices.

    The numbers equal those of `get_peft_model` for a Linear layer of that name, weight and data::

        factors = init_factors(linear.weight, "pissa", r=16)
        base = apply_factors(linear.weight, factors)  # W - B A, at lora_alpha = r

    A stack (stack, out, in), such as the experts of a layer, gives factors with the same leading
    dimension. Matrix e gets the numbers of one matrix with the name `name.e`.

    Args:
        weight: W (out, in) or (stack, out, in), floating point; it is not changed.
        method: as `init_lora_weights` of `LoraConfig`: a name, a bool, a mapping, or options.
        r: the rank.
        lora_alpha: the scaling s is lora_alpha / r; None means r, so that s = 1.
        use_rslora: the scaling s is lora_alpha / sqrt(r) instead.
        options: the method's settings by name, if `method` is a name.
        inputs: rows (tokens, in) of inputs, or moments from `calibrate`, for methods with "inputs"
            in `Initializer.reads`. Other methods ignore them. A method that compares several
            calibration sets takes a dict of these by the set's name. For a stack: rows (stack,
            tokens, in), or a list with one entry for each matrix.
        gradient: gradient of the loss with respect to `weight`, for methods with "gradient" in
            `Initializer.reads`.
        target_weight: the second weight, shaped as `weight`, for methods with "target_weight" in
            `Initializer.reads`; else None.
        output_moments: mean squares of the gradient of the loss with respect to each output, (out,)
            or (stack, out), for methods with "output_moments" in `Initializer.reads`.
        bias: the layer's bias, (out,) or (stack, out), for methods whose options read it; None
            means no bias.
        quantizer: the quantizer of a quantized base; None uses the method's options.
        seed: the seed of random numbers, together with `name`.
        name: the layer's qualified name; None means an empty name.
        device: where to compute; None means the device of `weight`. The result is on the device of
            `weight`.

    Returns:
        lora_A (r, in) and lora_B (out, r) in float32, and core (r, r) for methods that train only
        that. For methods that replace the base, also the recipe of the quantized weight. A stack
        adds a first dimension to each.

    Raises:
        ValueError: an argument has a wrong value or shape, required data is missing, or a value is
            not finite.
        TypeError: an argument has a wrong type.
    """
    spec, settings = _method(method, options)
    _check_weight(weight)
    scaling = _scaling(r, lora_alpha, use_rslora)
    given = {
        "inputs": inputs,
        "gradient": gradient,
        "output_moments": output_moments,
        "target_weight": target_weight,
        "bias": bias,
    }
    for setting in ("output_moments", "target_weight"):
        if given[setting] is not None and setting not in spec.reads:
            raise ValueError(
                f"{setting}={type(given[setting]).__name__} is not supported: {spec.name} does not "
                "read it. Leave it out."
            )
    initialize = partial(_initialize, spec, settings, r, scaling, quantizer, seed, device)
    if weight.ndim == 2:
        names = [name or ""]
        members = [initialize(name or "", weight, **given)]
    else:
        count = len(weight)
        names = [member_name(name, index) for index in range(count)]
        reads = spec.reads | settings.also_reads()
        read = {key: value for key, value in given.items() if key in reads or key == "bias"}
        columns = [member_data(key, value, count) for key, value in read.items()]
        rows = zip(*columns, strict=True) if columns else [()] * count
        members = [
            initialize(label, matrix, **dict(zip(read, row, strict=True)))
            for label, matrix, row in zip(names, weight, rows, strict=True)
        ]
    figures = [(n or "weight", r, one.metrics) for n, one in zip(names, members, strict=True)]
    warn_of_concerns(spec, settings, figures)
    return members[0] if weight.ndim == 2 else stacked_factors(members)


def _initialize(
    spec: Initializer,
    settings: Options,
    r: int,
    scaling: float,
    quantizer: Quantizer | None,
    seed: int,
    device: str | torch.device | None,
    name: str,
    weight: Float[Tensor, "out in"],
    inputs: Any = None,
    gradient: Any = None,
    output_moments: Any = None,
    target_weight: Any = None,
    bias: Any = None,
) -> Factors:
    """The factors of one matrix, on the device of `weight`."""
    shown = name or "weight"
    shape = (weight.shape[0], weight.shape[1])
    check_target_rank(shown, r, shape, spec, settings)
    reads = spec.reads | settings.also_reads()
    _check_bias(spec, "bias" in reads, weight, bias)
    if "target_weight" in spec.reads:
        _check_second(spec, weight, target_weight)
    place = wide_device(weight.device if device is None else torch.device(device))
    given = _data(spec, settings, weight, inputs, gradient, output_moments).to(place)
    stored = None
    if "weight" in reads:
        stored = weight.detach().to(place)
        if not is_narrow(stored.dtype):
            stored = stored.to(torch.float32)
    layer = Layer(
        names=(name,),
        kind="Linear",
        shape=shape,
        rank=r,
        scaling=scaling,
        seed=seed,
        stored_weight=stored,
        bias=_given_bias(weight, bias).to(place) if "bias" in reads else None,
        inputs=given.inputs,
        gradient=given.gradient,
        output_moments=given.output_moments,
        quantizer=quantizer,
        target_weight=None if target_weight is None else target_weight.detach().to(place),
    )
    if layer.stored_weight is not None:
        refuse_non_finite(shown, layer.stored_weight)
    with torch.no_grad(), full_precision():
        factors = spec.factors(layer, settings)
    check_shapes(shown, layer.shape, r, spec, factors)
    refuse_non_finite_factors(shown, spec, factors)
    return replace(
        factors,
        lora_A=factors.lora_A.to(weight.device).contiguous(),
        lora_B=factors.lora_B.to(weight.device).contiguous(),
        core=None if factors.core is None else factors.core.to(weight.device).contiguous(),
        base=spec.base,
    )


def _method(method: Any, options: Mapping[str, Any] | None) -> tuple[Initializer, Options]:
    spec, settings = resolve(method)
    if options is None:
        return spec, settings
    if not isinstance(options, Mapping):
        raise TypeError(
            f"options={options!r} is not supported: must be a mapping of settings by name; pass "
            "an options object as method"
        )
    if not isinstance(method, str):
        raise ValueError(
            f"options is not supported with method={method!r}: method must be a name. Put the "
            "options into method, or leave them out"
        )
    return spec, build_options(spec.options, options, f"options ({spec.name})")


def _check_weight(weight: Any) -> None:
    if not isinstance(weight, Tensor):
        kind = type(weight).__name__
        raise TypeError(f"weight of type {kind} is not supported: must be a tensor")
    if weight.ndim not in (2, 3) or not weight.is_floating_point() or not len(weight):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} and {weight.dtype} is not supported: must be a "
            "floating-point matrix (out, in), or a stack (stack, out, in); reshape or dequantize it"
        )


def _check_second(spec: Initializer, weight: Tensor, second: Any) -> None:
    fits = isinstance(second, Tensor) and second.shape == weight.shape
    if not fits or not second.is_floating_point():
        got = tuple(second.shape) if isinstance(second, Tensor) else second
        raise ValueError(
            f"target_weight={got!r} is not supported: must be a floating-point tensor "
            f"{tuple(weight.shape)}. Pass the second weight, which {spec.name} reads"
        )
    refuse_non_finite("target_weight", second)


def _check_bias(spec: Initializer, is_read: bool, weight: Tensor, bias: Any) -> None:
    if bias is None:
        return
    if not is_read:
        raise ValueError(
            f"bias={type(bias).__name__} is not supported: {spec.name} does not read it with these "
            "options. Leave it out."
        )
    if not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]:
        got = tuple(bias.shape) if isinstance(bias, Tensor) else bias
        raise ValueError(
            f"bias={got!r} is not supported: must be a tensor {tuple(weight.shape[:1])}. Pass the "
            "layer's bias"
        )
    refuse_non_finite("bias", bias)


def _given_bias(weight: Tensor, bias: Tensor | None) -> Float[Tensor, " out"]:
    return torch.zeros(len(weight)) if bias is None else bias.detach().float()


def _scaling(r: Any, lora_alpha: Any, use_rslora: bool) -> float:
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r={r!r} is not supported: must be an integer >= 1")
    alpha = r if lora_alpha is None else lora_alpha
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not 0 < alpha < float("inf"):
        raise ValueError(f"lora_alpha={lora_alpha!r} is not supported: must be a finite number > 0")
    return alpha / (r**0.5 if use_rslora else r)


def _data(
    spec: Initializer,
    settings: Options,
    weight: Tensor,
    inputs: Any,
    gradient: Any,
    output_moments: Any,
) -> LayerStatistics:
    """The data that the method reads, checked against the weight's shape."""
    found = LayerStatistics()
    if "inputs" in spec.reads:
        found.inputs = _inputs(spec, settings, weight, inputs)
    if "gradient" in spec.reads:
        if not isinstance(gradient, Tensor) or gradient.shape != weight.shape:
            got = tuple(gradient.shape) if isinstance(gradient, Tensor) else gradient
            raise ValueError(
                f"gradient={got!r} is not supported: must be a tensor {tuple(weight.shape)}. Pass "
                f"the gradient of the loss, which {spec.name} reads"
            )
        refuse_non_finite("gradient", gradient)
        found.gradient = gradient.detach().float()
    if "output_moments" in spec.reads:
        shape = tuple(weight.shape[:1])
        if not isinstance(output_moments, Tensor) or output_moments.shape != shape:
            got = output_moments
            got = tuple(got.shape) if isinstance(got, Tensor) else got
            raise ValueError(
                f"output_moments={got!r} is not supported: must be a tensor {shape}. Pass the mean "
                f"squares of the gradient of the loss by each output, which {spec.name} reads"
            )
        refuse_non_finite("output_moments", output_moments)
        found.output_moments = wide(output_moments.detach())
    return found


def _inputs(spec: Initializer, settings: Options, weight: Tensor, inputs: Any) -> Inputs:
    """The moments of one set, or of the sets that the method reads."""
    wanted = settings.input_request().sets
    given = inputs.sets if isinstance(inputs, InputSets) else inputs
    named = isinstance(given, Mapping)
    if wanted and not (named and set(given) == set(wanted)):
        shown = ", ".join(f"{name!r}: rows" for name in wanted)
        got = f"the sets {', '.join(map(repr, given))}" if named else type(given).__name__
        raise ValueError(
            f"inputs={got} is not supported: must be a dict with the sets "
            f"{', '.join(map(repr, wanted))}, which {spec.name} compares. Pass inputs={{{shown}}}"
        )
    if wanted:
        return InputSets({name: _moments(spec, weight, given[name]) for name in wanted})
    if named:
        raise ValueError(
            f"inputs with the sets {', '.join(map(repr, given))} is not supported: must be one "
            f"set, which {spec.name} reads. Pass the rows of one of them"
        )
    return _moments(spec, weight, inputs)


def _moments(
    spec: Initializer, weight: Tensor, inputs: Any
) -> InputStatistics | LeadingComponents | StackedInputs:
    if inputs is None:
        raise ValueError(
            f"inputs=None is not supported: {spec.name} reads the layer's inputs. Pass rows "
            f"(tokens, {weight.shape[1]})"
        )
    if not isinstance(inputs, Tensor):
        return inputs
    if inputs.ndim != 2 or inputs.shape[1] != weight.shape[1] or not inputs.is_floating_point():
        raise ValueError(
            f"inputs of shape {tuple(inputs.shape)} and {inputs.dtype} are not supported: must be "
            f"floating-point rows (tokens, {weight.shape[1]})"
        )
    refuse_non_finite("inputs", inputs)
    return InputStatistics.of_rows(inputs)
