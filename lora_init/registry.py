"""The registry of initializers: what each is called, needs, does and serves.

A method is a pure function registered by a decorator in a file of its own::

    @dataclass
    class MyOptions:
        strength: float = 1.0

    @register_initializer("mine", options=MyOptions, paper="…", base="subtract")
    def mine(weight, rank, scaling, statistics, options, generator):
        return Factors(lora_A=…, lora_B=…)

Files in `lora_init/initializers/` are found by themselves. A third party's package is found through
the entry-point group ``lora_init.initializers``, whose entries name modules to import.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import importlib.metadata
import pkgutil
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from lora_init.factors import Base, Factors
from lora_init.weights.kinds import LINEAR_TYPES, MODULE_TYPES

ENTRY_POINT_GROUP = "lora_init.initializers"


@dataclass(frozen=True)
class CalibrationRequest:
    """Which statistics of a layer a method wants: the moments of its inputs, or the gradient.

    Attributes:
        ignore_label: token positions with this label are left out; None masks by attention only.
        smallest: directions in which the inputs hardly vary matter, too: the moments are summed in
            float64, for twice the time and memory.
        gradients: the loss's gradient with respect to the weight, instead of the inputs' moments;
            the batches then need labels.
    """

    ignore_label: int | None = None
    smallest: bool = False
    gradients: bool = False


@dataclass(frozen=True)
class Nesting:
    """The promise of a method whose factors of rank r are the first r of those of any higher rank,
    and which draws nothing at random: a cache may keep them (see `lora_init.initialize.cached`).

    Attributes:
        version: of the method's code, raised whenever its results change.
        balanced: whether both factors fall with the square root of the scaling; else neither does.
    """

    version: int = 1
    balanced: bool = True


@dataclass
class NoOptions:
    """For methods without a setting of their own."""


@dataclass(frozen=True, repr=False)
class Initializer:
    """One registered method and everything the core must know before it runs it.

    Attributes:
        name: the registered name, e.g. ``"pissa"``.
        function: ``(weight, rank, scaling, statistics, options, generator) -> Factors``; pure.
        options: dataclass of the method's settings, validated in its ``__post_init__``.
        paper: where the method comes from.
        base: what becomes of the base weight (keep, subtract or replace).
        preserves_output: whether the model's function at step 0 is the base model's.
        needs: what it reads: "weights", "inputs" or "gradients" (calibration), "quantizer".
        module_types: the module types it serves; by default the linear ones. "Conv2d" is served
            through the unfolded matrix, "Embedding" as a linear map of one-hot inputs.
        variants: another function for some module types, where the formula differs there.
        frozen: factors that are not trained, e.g. ``("lora_B",)``.
        rank_rule: ``(rank, out, in) -> str | None``: why this rank cannot be served, or None.
        calibration: ``options -> CalibrationRequest``; None for methods without calibration.
        leading: ``options -> multiple of r``: how many leading directions of the inputs a layer of
            rank r needs; None: all there are, so that no sketch serves (see
            `lora_init.calibration.sketch`).
        allocate: ``(requests, options) -> ranks``; chooses all layers' ranks from their statistics
            before any layer is initialized (see `lora_init.allocation`). None keeps them.
        stacks: whether the function also takes a stack of weights (k, out, in) of one shape, with
            stacked statistics where it needs them (`lora_init.calibration.result.stacked`) and a
            list of
            generators. It then returns stacked factors and metrics.
        narrow: whether the function takes weights in bfloat16 and float16 as they are stored. They
            are converted to float32 for other methods.
        nesting: ``options -> Nesting | None``: whether the factors nest.
        adjust_alpha: ``options -> bool``: whether a layer whose rank was re-allocated keeps its
            scaling (its alpha is changed to that end).
        spellings: regular expressions of further names, each with ``match -> options``.
        workspace: ``options -> (weights, moments)``: how many float32 copies of a layer's weight
            and of its inputs' second moment the function has in memory at its peak (at ranks far
            below the layer's sizes), for the plan and the benchmark.
        control: it is no proposal for a start, but isolates one cause of another method's effect.
    """

    name: str
    function: Callable[..., Factors]
    options: type = NoOptions
    paper: str = ""
    base: Base = "keep"
    preserves_output: bool = True
    needs: frozenset[str] = frozenset()
    module_types: frozenset[str] = frozenset(LINEAR_TYPES)
    variants: Mapping[str, Callable[..., Factors]] = field(default_factory=dict)
    frozen: tuple[Literal["lora_A", "lora_B"], ...] = ()
    rank_rule: Callable[[int, int, int], str | None] | None = None
    calibration: Callable[[Any], CalibrationRequest] | None = None
    leading: Callable[[Any], float | None] = lambda options: None
    allocate: Callable[..., dict[str, int]] | None = None
    stacks: bool = False
    narrow: bool = False
    nesting: Callable[[Any], Nesting | None] = lambda options: None
    adjust_alpha: Callable[[Any], bool] = lambda options: True
    spellings: Mapping[str, Callable[[re.Match], Any]] = field(default_factory=dict)
    workspace: Callable[[Any], tuple[float, float]] = lambda options: (3.0, 0.0)
    control: bool = False

    def function_for(self, module_type: str) -> Callable[..., Factors]:
        return self.variants.get(module_type, self.function)

    def __repr__(self) -> str:
        return (
            f"Initializer({self.name!r}, base={self.base!r}, needs={sorted(self.needs)}, "
            f"module_types={sorted(self.module_types)}, paper={self.paper!r}"
            f"{', control=True' if self.control else ''})"
        )

    def __reduce__(self) -> tuple:
        """Pickled as its name: a model knows its method, and lambdas cannot be pickled."""
        return get_initializer, (self.name,)


_registry: dict[str, Initializer] = {}
_loaded: bool | None = False
"""None while the methods are being imported."""
_loading = threading.RLock()
"""Held while methods are imported: other threads wait, the importing one may call back."""


def register_initializer(name: str, **properties: Any) -> Callable[[Callable], Callable]:
    """Register a function as the initializer `name`; `properties` are `Initializer`'s attributes.

    Raises:
        ValueError: if the name is taken, or is not lower-case letters, digits and underscores, or
            if `needs` and `calibration` contradict each other.
    """

    def decorate(function: Callable[..., Factors]) -> Callable[..., Factors]:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(
                f"initializer name {name!r}: lower-case letters, digits and underscores are allowed"
            )
        known = _registry.get(name)
        if known is not None:
            raise ValueError(
                f"initializer {name!r} is already registered by {known.function.__module__}; "
                "choose another name"
            )
        needs = frozenset(properties.pop("needs", ()))
        module_types = frozenset(properties.pop("module_types", LINEAR_TYPES))
        unknown = module_types - set(MODULE_TYPES)
        if unknown:
            raise ValueError(
                f"initializer {name!r}: module_types has {', '.join(sorted(unknown))}; allowed are "
                f"{', '.join(MODULE_TYPES)}"
            )
        spec = Initializer(name, function, needs=needs, module_types=module_types, **properties)
        if bool(spec.needs & {"inputs", "gradients"}) != (spec.calibration is not None):
            raise ValueError(
                f"initializer {name!r}: needs={sorted(spec.needs)} and calibration="
                f"{spec.calibration!r} contradict each other; a method that needs 'inputs' or "
                "'gradients' says which statistics, e.g. calibration=lambda options: "
                "CalibrationRequest()"
            )
        _registry[name] = spec
        return function

    return decorate


def list_initializers(pattern: str = "*") -> list[Initializer]:
    """All registered initializers whose name matches the shell-style `pattern`, by name."""
    _load()
    return [_registry[name] for name in sorted(fnmatch.filter(_registry, pattern))]


def get_initializer(name: str) -> Initializer:
    """Look up a registered initializer by its name, in any case ("PiSSA", "LoRA-GA").

    Raises:
        ValueError: for an unknown name, with the nearest known ones.
    """
    _load()
    given, name = name, method_name(name)
    if name not in _registry:
        near = difflib.get_close_matches(name, _registry, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"init_lora_weights={given!r} is not a registered initializer: {hint}"
            f"allowed are True (kaiming), False (random) and {', '.join(sorted(_registry))}"
        )
    return _registry[name]


def method_name(spelling: str) -> str:
    """The registered spelling of a method's name: "OLoRA" is "olora", "LoRA-GA" is "lora_ga"."""
    return spelling.lower().replace("-", "_")


def resolve(setting: Any) -> tuple[Initializer, Any]:
    """Turn any accepted form of ``init_lora_weights`` into an initializer and its options.

    Accepted are True (kaiming), False (random), a name (``"pissa"``, ``"pissa_niter_4"``), a
    mapping ``{"name": "pissa", "niter": 4}``, or an options instance, whose type names the method.

    Raises:
        ValueError: unknown name or option, or an option's value that its dataclass refuses.
        TypeError: any other type.
    """
    _load()
    if isinstance(setting, bool):
        setting = "kaiming" if setting else "random"
    if isinstance(setting, str):
        for spec in _registry.values():
            for expression, make in spec.spellings.items():
                if match := re.fullmatch(expression, method_name(setting)):
                    return spec, make(match)
        spec = get_initializer(setting)
        return spec, spec.options()
    if isinstance(setting, Mapping):
        values = dict(setting)
        if not isinstance(values.get("name"), str):
            raise ValueError(
                f"init_lora_weights={setting!r}: a mapping needs the key 'name', "
                "e.g. {'name': 'pissa', 'niter': 4}"
            )
        spec = get_initializer(values.pop("name"))
        return spec, build_options(spec.options, values, f"init_lora_weights ({spec.name})")
    if is_dataclass(setting) and not isinstance(setting, type) and type(setting) is not NoOptions:
        for spec in _registry.values():
            if spec.options is type(setting):
                return spec, setting
    raise TypeError(
        f"init_lora_weights={setting!r} of type {type(setting).__name__}: allowed are a bool, a "
        "name, a mapping with the key 'name', or a registered method's options"
    )


def build_options(options: type, values: Mapping[str, Any], setting: str) -> Any:
    """Make an options instance from a mapping, refusing unknown keys by name."""
    known = [f.name for f in fields(options)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"{setting}: unknown option {key!r}; {hint}allowed are "
                f"{', '.join(known) if known else 'none'}"
            )
    return options(**values)


def describe(spec: Initializer, options: Any) -> dict[str, Any]:
    """The mapping form of a method and its options; `resolve` is its inverse."""
    return {"name": spec.name, **asdict(options)}


def _load() -> None:
    """Import the package's own methods and the entry points of third parties, once."""
    global _loaded
    if _loaded is True:
        return
    with _loading:
        if _loaded is not False:  # loaded meanwhile, or called back by a module imported below
            return
        _loaded = None
        try:
            package = importlib.import_module("lora_init.initializers")
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{package.__name__}.{module.name}")
            for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
                entry.load()
        except BaseException:
            _loaded = False
            raise
        _loaded = True
