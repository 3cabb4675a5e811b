"""The starts of the registered methods on one model: their factors and first gradients.

All methods get the same layers, rank and data, and the scaling s = 1 (alpha = rank). Their options
are the library's defaults with two exceptions:

- `eva`: rho = 1, so that its layers have the same rank as all others; `eva_uncentred` is the same
  on the uncentered second moment, which the paper's theorem is about;
- `lora_one`: gamma = 8 √r, which gives at s = 1 the first step of its authors' gamma at their s.

A method that changes the model's function at step 0 has different gradients: those of the model
after the change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lora_init import (
    Calibration,
    LoraConfig,
    LoraModel,
    calibrate,
    get_peft_model,
    list_initializers,
)
from lora_init.calibration.gradients import collect_gradients
from lora_init.registry import Initializer, resolve

from ..errors import ConfigurationError, nearest
from ..report.palette import ordered
from .subject import Subject

UNCENTRED = "eva_uncentred"

Gradients = Mapping[str, Float[Tensor, "out in"]]


@dataclass(frozen=True)
class Start:
    """A method's start on a model that is adapted while the context lasts.

    Attributes:
        lora_A, lora_B: by layer.
    """

    method: str
    initializer: Initializer
    subject: Subject
    lora_A: Mapping[str, Float[Tensor, "rank in"]]
    lora_B: Mapping[str, Float[Tensor, "out rank"]]

    def gradients(self, batches: Sequence[Mapping[str, Tensor]]) -> Gradients:
        """The mean gradient of each layer's whole weight, of the model at step 0."""
        inner = {f"{name}.base_layer": name for name in self.lora_A}
        found = collect_gradients(self.subject.model, inner, batches)
        return {inner[name]: gradient for name, gradient in found.items()}


def moves_function(initializer: Initializer) -> bool:
    """Whether the method changes the model's function at step 0."""
    return not initializer.preserves_output


def startable() -> list[str]:
    """The methods for linear layers, in the order of all charts, and the uncentered EVA."""
    names = {spec.name for spec in list_initializers() if "Linear" in spec.module_types}
    return [*ordered(names), UNCENTRED]


def check_methods(methods: Sequence[str]) -> None:
    """Refuse names that no method has.

    Raises:
        ValueError: the message has the nearest name.
    """
    allowed = startable()
    for name in methods:
        if name not in allowed:
            raise ValueError(
                f"methods={name!r} is not supported: must be one of {', '.join(allowed)}. "
                f"{nearest(name, allowed)}"
            )


def setting(method: str, rank: int) -> dict[str, Any]:
    """The value of `init_lora_weights` for a name of `startable`."""
    if method in ("eva", UNCENTRED):
        return {"name": "eva", "rho": 1.0, "center": method == "eva"}
    if method == "lora_one":
        return {"name": method, "gamma": 8 * rank**0.5}
    return {"name": method}


def configuration(method: str, names: Sequence[str], rank: int) -> LoraConfig:
    """The configuration of a method on some layers, at the scaling 1."""
    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(names), init_lora_weights=setting(method, rank)
    )


def calibration_for(
    subject: Subject, methods: Sequence[str], names: Sequence[str], rank: int, batches: Sequence
) -> Calibration | None:
    """The statistics that these methods need, collected in one pass over the data.

    Raises:
        ConfigurationError: a method refuses the rank or the data.
    """
    driven = [method for method in methods if resolve(setting(method, rank))[0].needs_data]
    if not driven:
        return None
    configs = [configuration(method, names, rank) for method in driven]
    try:
        return calibrate(subject.model, configs, batches)
    except ValueError as error:
        raise ConfigurationError(f"rank={rank}: {error}") from error


@contextmanager
def adapted(
    model: nn.Module,
    config: LoraConfig,
    named: str,
    calibration: Any = None,
    *,
    seed: int = 0,
    keep_original: bool = False,
) -> Iterator[LoraModel]:
    """The model with an adapter, while the context lasts; it is frozen afterwards.

    Args:
        named: the setting that an error names.
        calibration: for methods that need data; others do not get it.

    Raises:
        ConfigurationError: the method refuses the rank, the model or the data.
    """
    try:
        needed = config.initializer()[0].needs_data
        found = get_peft_model(
            model,
            config,
            calibration=calibration if needed else None,
            seed=seed,
            keep_original=keep_original,
            cache=False,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigurationError(f"{named}: {error}") from error
    try:
        yield found
    finally:
        found.unload()
        model.requires_grad_(False)


@contextmanager
def started(
    subject: Subject,
    method: str,
    names: Sequence[str],
    rank: int,
    calibration: Any = None,
    *,
    seed: int = 0,
) -> Iterator[Start]:
    """The model with a method's start, while the context lasts.

    Raises:
        ConfigurationError: the method refuses the rank or the model.
    """
    initializer, _ = resolve(setting(method, rank))
    config, named = configuration(method, names, rank), f"{method}, rank={rank}"
    keep = initializer.base == "replace"
    with adapted(subject.model, config, named, calibration, seed=seed, keep_original=keep) as model:
        layers = model.layers
        yield Start(
            method=method,
            initializer=initializer,
            subject=subject,
            lora_A={name: layers[name].lora_A.detach() for name in names},
            lora_B={name: layers[name].lora_B.detach() for name in names},
        )
