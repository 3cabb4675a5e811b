"""Layers for tests that call a method's function directly."""

from lora_init.layer import Layer
from lora_init.linalg.moments import InputSets, InputStatistics


def layer_of(weight, rank, scaling=2.0, *, name="layer", **parts):
    """A layer with this weight, or with the weight's shape where it is on the meta device.

    Args:
        weight: (out, in); (stack, out, in) for a stack.
        name: of the layer; a tuple of names for a stack.
        parts: further attributes of `Layer`.
    """
    is_stack = isinstance(name, tuple)
    return Layer(
        names=name if is_stack else (name,),
        kind=parts.pop("kind", "Linear"),
        shape=tuple(weight.shape[-2:]),
        rank=rank,
        scaling=scaling,
        stored_weight=None if weight.is_meta else weight,
        is_stack=is_stack,
        **parts,
    )


def parts_of(request, moments, gradient):
    """The attributes of `Layer` that a method reads; None for no request.

    Args:
        request: the method's `CalibrationRequest`.
        moments: `InputStatistics` of its inputs; other sets have the first half of its directions.
        gradient: (out, in).
    """
    if request is None:
        return {}
    if request.output_moments:
        squares = gradient.double().square().mean(1)
        return {"inputs": moments, "gradient": gradient, "output_moments": squares}
    if request.gradients:
        return {"gradient": gradient}
    if not request.sets:
        return {"inputs": moments}
    half = moments.covariance.clone()
    half[len(half) // 2 :] = half[:, len(half) // 2 :] = 0
    other = InputStatistics(half, moments.mean, moments.tokens)
    return {"inputs": InputSets(dict(zip(request.sets, (moments, other), strict=True)))}


def settings_of_scalings(rank):
    """By scaling s: the settings (lora_alpha, use_rslora) that give it at this rank."""
    plain = {scaling: (scaling * rank, False) for scaling in (1 / 16, 1.0, 2.0, 16.0)}
    return plain | {4.0: (4 * rank**0.5, True)}


def product(factors, scaling=2.0):
    """s B A in float64."""
    return scaling * factors.lora_B.double() @ factors.lora_A.double()
