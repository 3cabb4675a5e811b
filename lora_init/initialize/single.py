"""Initial factors of a single weight matrix, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from lora_init.layer import Inputs, Layer, LayerStatistics
from lora_init.linalg.matrix import refuse_non_finite
from lora_init.linalg.mixed_products import is_narrow
from lora_init.linalg.precision import full_precision, wide_device
from lora_init.moments import InputSets, InputStatistics, LeadingComponents, StackedInputs
from lora_init.plan.check import check_target_rank
from lora_init.quantization import Quantizer
from lora_init.registry import Initializer, Options, build_options, resolve


def init_factors(
    weight: Float[Tensor, "out in"],
    method: str | bool | Mapping[str, Any] | Options = "pissa",
    *,
    r: int,
    lora_alpha: float | None = None,
    use_rslora: bool = False,
    options: Mapping[str, Any] | None = None,
    inputs: Float[Tensor, "tokens in"] | Inputs | Mapping[str, Any] | None = None,
    gradient: Float[Tensor, "out in"] | None = None,
    output_moments: Float[Tensor, " out"] | None = None,
    target_weight: Tensor | None = None,
    quantizer: Quantizer | None = None,
    seed: int = 0,
    name: str | None = None,
    device: str | torch.device | None = None,
) -> Factors:
    """Compute the initial factors of one weight matrix.

    The numbers equal those of `get_peft_model` for a Linear layer of that name, weight and data::

        factors = init_factors(linear.weight, "pissa", r=16)
        residual = linear.weight - factors.lora_B @ factors.lora_A  # at lora_alpha = r

    Args:
        weight: W (out, in), floating point; it is not changed.
        method: as `init_lora_weights` of `LoraConfig`: a name, a bool, a mapping, or options.
        r: the rank.
        lora_alpha: the scaling s is lora_alpha / r; None means r, so that s = 1.
        use_rslora: the scaling s is lora_alpha / sqrt(r) instead.
        options: the method's settings by name, if `method` is a name.
        inputs: rows (tokens, in) of inputs, or moments from `calibrate`, for methods with "inputs"
            in `Initializer.reads`. Other methods ignore them. A method that compares several
            calibration sets takes a dict of these by the set's name.
        gradient: gradient of the loss with respect to `weight`, for methods with "gradient" in
            `Initializer.reads`.
        target_weight: the second weight (out, in), for methods with "target_weight" in
            `Initializer.reads`; else None.
        output_moments: mean squares of the gradient of the loss with respect to each output, for
            methods with "output_moments" in `Initializer.reads`.
        quantizer: the quantizer of a quantized base; None uses the method's options.
        seed: the seed of random numbers, together with `name`.
        name: the layer's qualified name; None means an empty name.
        device: where to compute; None means the device of `weight`. The result is on the device of
            `weight`.

    Returns:
        lora_A (r, in) and lora_B (out, r) in float32, and core (r, r) for methods that train only
        that. For methods that replace the base, also the
        recipe of the quantized weight.

    Raises:
        ValueError: an argument has a wrong value or shape, required data is missing, or a value is
            not finite.
        TypeError: an argument has a wrong type.
    """
    spec, settings = _method(method, options)
    _check_weight(weight)
    scaling = _scaling(r, lora_alpha, use_rslora)
    check_target_rank(name or "weight", r, (weight.shape[0], weight.shape[1]), spec, settings)
    for setting, value in (("output_moments", output_moments), ("target_weight", target_weight)):
        if value is not None and setting not in spec.reads:
            raise ValueError(
                f"{setting}={type(value).__name__} is not supported: {spec.name} does not read it. "
                "Leave it out."
            )
    if "target_weight" in spec.reads:
        _check_second(spec, weight, target_weight)
    place = wide_device(weight.device if device is None else torch.device(device))
    given = _data(spec, settings, weight, inputs, gradient, output_moments).to(place)
    stored = None
    if "weight" in spec.reads | settings.also_reads():
        stored = weight.detach().to(place)
        if not is_narrow(stored.dtype):
            stored = stored.to(torch.float32)
    layer = Layer(
        names=(name or "",),
        kind="Linear",
        shape=(weight.shape[0], weight.shape[1]),
        rank=r,
        scaling=scaling,
        seed=seed,
        stored_weight=stored,
        inputs=given.inputs,
        gradient=given.gradient,
        output_moments=given.output_moments,
        quantizer=quantizer,
        target_weight=None if target_weight is None else target_weight.detach().to(place),
    )
    if layer.stored_weight is not None:
        refuse_non_finite(name or "weight", layer.stored_weight)
    with torch.no_grad(), full_precision():
        factors = spec.factors(layer, settings)
    check_shapes(name or "weight", layer.shape, r, spec, factors)
    refuse_non_finite_factors(name or "weight", spec, factors)
    warn_of_concerns(spec, settings, [(name or "weight", r, factors.metrics)])
    return replace(
        factors,
        lora_A=factors.lora_A.to(weight.device).contiguous(),
        lora_B=factors.lora_B.to(weight.device).contiguous(),
        core=None if factors.core is None else factors.core.to(weight.device).contiguous(),
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
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} and {weight.dtype} is not supported: must be a "
            "floating-point matrix (out, in); reshape or dequantize it"
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
        found.output_moments = output_moments.detach().double()
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
