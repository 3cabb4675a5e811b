"""The registry of initialization methods, and how to add one.

A method is a pure function in one file, registered by a decorator::

    @dataclass
    class MyOptions(Options):
        strength: float = 1.0

    @register_initializer("mine", options=MyOptions, reads=("weight",), base="subtract", paper="…")
    def mine(layer: Layer, options: MyOptions) -> Factors:
        return Factors(lora_A=…, lora_B=…)

Files in `lora_init/initializers/` are imported automatically. Other packages name their modules in
the entry-point group ``lora_init.initializers``.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch

from lora_init.entry_points import EntryPoints
from lora_init.factors import Base, Factors
from lora_init.layer import Layer, LayerRequest
from lora_init.weights.format import Operation, WeightFormat, weight_formats

_METHODS = EntryPoints("lora_init.initializers", package="lora_init.initializers")

Reads = Literal[
    "weight", "inputs", "gradient", "output_moments", "quantizer", "target_weight", "bias"
]
"""The parts of a `Layer` that a method reads, in addition to shape, rank, scaling and generator."""

Method = Callable[[Layer, Any], Factors]


@dataclass(frozen=True)
class CalibrationRequest:
    """The statistics that a calibration collects for a layer: input moments, a gradient, or both.

    Attributes:
        ignore_label: skip positions with this label; None masks by attention only.
        smallest: sum the moments in float64, for methods that use the directions of least
            variance. This doubles time and memory.
        gradients: collect the gradient of the loss with respect to the weight instead of the
            moments of the inputs. The batches then need labels.
        output_moments: with `gradients`, collect in the same pass the moments of the inputs and the
            mean squares of the gradients with respect to the outputs.
        sets: names of the calibration sets, for methods that compare the inputs of several, such as
            ``("learn", "keep")``. Empty for methods that read one set.
    """

    ignore_label: int | None = None
    smallest: bool = False
    gradients: bool = False
    output_moments: bool = False
    sets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.output_moments and not self.gradients:
            raise ValueError(
                "output_moments=True is not supported with gradients=False: one backward pass "
                "collects both. Set gradients=True"
            )
        if self.sets and self.gradients:
            raise ValueError(
                f"sets={self.sets} is not supported with gradients=True: must be empty, because "
                "only the inputs of several sets are compared. Leave one of them out"
            )

    @property
    def inputs(self) -> bool:
        """Whether the moments of the inputs are collected."""
        return self.output_moments or not self.gradients


OVERSAMPLING, POWERS = 16, 1
"""Extra triplets and power steps of a gradient sketch, as in `lora_init.calibration.sketch`."""


def sums_dtype(requests: Iterable[CalibrationRequest]) -> torch.dtype:
    """The dtype in which one calibration pass sums the input moments for all `requests`."""
    precise = any(request.smallest for request in requests)
    return torch.float64 if precise else torch.float32


@dataclass
class Options:
    """Base class for the settings of a method: a dataclass that checks its values.

    A subclass overrides the attributes and methods that differ for it.

    Attributes:
        frozen: factors that are not trained, such as ``("lora_B",)``.
        has_core: whether only a matrix (rank × rank) between the frozen factors is trained, see
            `Factors.core`.
        allocate: ``options.allocate(requests) -> ranks`` chooses the ranks of all layers from
            their statistics; None keeps the planned ranks.
    """

    frozen: ClassVar[tuple[Literal["lora_A", "lora_B"], ...]] = ()
    has_core: ClassVar[bool] = False
    allocate: ClassVar[Callable[[Mapping[str, LayerRequest]], dict[str, int]] | None] = None

    @classmethod
    def from_name(cls, name: str) -> Options | None:
        """The options for a name that contains settings, like "pissa_niter_4"; else None."""
        return None

    def also_reads(self) -> frozenset[Reads]:
        """Parts of a layer that these settings read, in addition to `Initializer.reads`."""
        return frozenset()

    def input_request(self) -> CalibrationRequest:
        """The moments to collect for a method that reads the inputs."""
        return CalibrationRequest()

    def refuse_rank(self, rank: int, shape: tuple[int, int]) -> str | None:
        """The reason why a weight of `shape` (out, in) cannot have this rank; None if it can."""
        return None

    def concern(self, metrics: Mapping[str, Any], rank: int) -> str | None:
        """What a user should change, given the figures of one layer; None if nothing.

        The text becomes part of a warning.
        """
        return None

    def keeps_scaling(self) -> bool:
        """Whether alpha changes with an allocated rank, so that the scaling stays the same."""
        return True

    def directions(self, rank: int, shape: tuple[int, int]) -> int | None:
        """How many leading directions of the inputs, or triplets of the gradient, the method reads.

        None means all of them: the whole second moment or gradient.
        """
        return None


@dataclass(frozen=True, repr=False)
class Initializer:
    """One registered method.

    Attributes:
        name: for example "pissa".
        function: ``(layer, options) -> Factors``; pure.
        options: the dataclass of the method's settings.
        paper: the source of the method.
        base: what happens to the base weight: "keep", "subtract" or "replace".
        preserves_output: whether the output at step 0 equals that of the base model.
        reads: what the method reads: "weight", "bias", "inputs", "gradient", "output_moments",
            "quantizer", "target_weight".
        operations: the supported ways to apply a matrix: "product" (linear layers),
            "convolution" (a matrix on patches) or "lookup" (a linear map of one-hot vectors). Every
            weight format with one of them is supported. The matrices of fused experts and of
            routers are products too, but routers do not support methods that read "output_moments".
            The name of a weight format adds this format only.
        control: whether the method is only for experiments: it isolates one cause of another
            method's effect.
    """

    name: str
    function: Method
    options: type[Options] = Options
    paper: str = ""
    base: Base = "keep"
    preserves_output: bool = True
    reads: frozenset[str] = frozenset()
    operations: frozenset[str] = frozenset({"product"})
    control: bool = False

    def supports(self, stored: WeightFormat) -> bool:
        """Whether the method supports modules of a weight format."""
        if stored.operation == "selection" and "output_moments" in self.reads:
            return False  # a router's output is not the product with its weight
        if stored.operation in ("routed", "selection"):
            return "product" in self.operations
        return not self.operations.isdisjoint({stored.operation, stored.name})

    @property
    def modules(self) -> frozenset[str]:
        """The names of the supported weight formats."""
        return frozenset(name for name, one in weight_formats().items() if self.supports(one))

    @property
    def needs(self) -> frozenset[str]:
        """The former name and spelling of `reads`: "weights" and "gradients" in the plural."""
        plural = {"weight": "weights", "gradient": "gradients"}
        return frozenset(plural.get(one, one) for one in self.reads)

    @property
    def module_types(self) -> frozenset[str]:
        """The former name of `modules`."""
        return self.modules

    @property
    def frozen(self) -> tuple[Literal["lora_A", "lora_B"], ...]:
        """Factors that are not trained."""
        return ("lora_A", "lora_B") if self.has_core else self.options.frozen

    @property
    def has_core(self) -> bool:
        """Whether only a core between the factors is trained; see `Factors.core`."""
        return self.options.has_core

    @property
    def is_batched(self) -> bool:
        """Whether the function also accepts a stack of layers."""
        return getattr(self.function, "is_batched", False)

    def workspace(self, options: Any) -> tuple[float, float]:
        """How many float32 copies of a weight and of its moments are in memory at the peak.

        `workspace` states them for a method; others get the largest of the methods that read the
        same parts of a layer.
        """
        stated: Any = getattr(self.function, "workspace", None)
        if stated is not None:
            return stated if isinstance(stated, tuple) else stated(options)
        decomposes = self.reads & {"weight", "target_weight", "quantizer"}
        weights = 13.0 if decomposes else 4.0 if self.reads else 3.0
        return weights, 9.5 if "inputs" in self.reads else 0.0

    @property
    def allocates(self) -> bool:
        """Whether the method chooses the ranks of the layers."""
        return self.options.allocate is not None

    @property
    def needs_data(self) -> bool:
        """Whether the method needs calibration data: it reads inputs or gradients."""
        return bool(self.reads & {"inputs", "gradient", "output_moments"})

    def factors(self, layer: Layer, options: Options) -> Factors:
        """Call the function.

        Raises:
            TypeError: the function returns something else than `Factors`.
        """
        try:
            found = self.function(layer, options)
        except (AttributeError, TypeError) as error:
            declared = sorted(self.reads) or "nothing"
            error.add_note(
                f"initializer {self.name!r} declares reads={declared}: other data of the layer are "
                "None"
            )
            raise
        if not isinstance(found, Factors):
            raise TypeError(
                f"initializer {self.name!r} returned {type(found).__name__}: must be "
                "lora_init.Factors(lora_A, lora_B)"
            )
        return found

    def request(self, options: Options) -> CalibrationRequest | None:
        """The statistics to collect; None for a method that needs no calibration data."""
        if self.reads & {"inputs", "gradient", "output_moments"} == {"gradient"}:
            return CalibrationRequest(gradients=True)
        if self.reads & {"gradient", "output_moments"}:
            return replace(options.input_request(), gradients=True, output_moments=True)
        return options.input_request() if "inputs" in self.reads else None

    def __repr__(self) -> str:
        return (
            f"Initializer({self.name!r}, base={self.base!r}, reads={sorted(self.reads)}, "
            f"operations={sorted(self.operations)}, paper={self.paper!r}"
            f"{', control=True' if self.control else ''})"
        )

    def __reduce__(self) -> tuple:
        """Pickled as its name: functions that a notebook defines cannot be pickled."""
        return get_initializer, (self.name,)


_registry: dict[str, Initializer] = {}


def register_initializer(
    name: str,
    *,
    options: type[Options] = Options,
    paper: str = "",
    base: Base = "keep",
    preserves_output: bool = True,
    reads: Iterable[Reads] = (),
    operations: Iterable[Operation] | None = None,
    modules: Iterable[str] = (),
    control: bool = False,
) -> Callable[[Method], Method]:
    """Register a function as the initializer `name`; `Initializer` describes the arguments.

    Args:
        operations: None means "product", or nothing if `modules` is given.
        modules: names of single weight formats, such as "Linear". Operations are better: they
            include the formats that are added later.

    Raises:
        TypeError: `options` is not a subclass of `Options`.
        ValueError: the name is taken or malformed, or an argument has an unknown value.
    """

    def decorate(function: Method) -> Method:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(
                f"initializer name {name!r} is not supported: must be lower-case letters, digits "
                "and underscores, and begin with a letter"
            )
        known = _registry.get(name)
        if known is not None:
            raise ValueError(
                f"initializer {name!r} of {function.__module__} is already registered by "
                f"{known.function.__module__}; choose another name"
            )
        if not (isinstance(options, type) and issubclass(options, Options)):
            raise TypeError(
                f"initializer {name!r}: options={options!r} must be a dataclass that inherits from "
                "lora_init.registry.Options"
            )
        _check_call(name, function)
        lists = {"reads": reads, "operations": operations or (), "modules": modules}
        for argument, value in lists.items():
            if isinstance(value, str):
                raise TypeError(
                    f"initializer {name!r}: {argument}={value!r} is not supported: must be a list; "
                    f"pass [{value!r}]"
                )
        given = {argument: frozenset(value) for argument, value in lists.items()}
        if operations is None and not given["modules"]:
            given["operations"] = frozenset({"product"})
        given["base"] = frozenset({base})
        supported = {
            "reads": get_args(Reads),
            "operations": get_args(Operation),
            "modules": tuple(weight_formats()) if given["modules"] else (),
            "base": get_args(Base),
        }
        for argument, values in given.items():
            if unknown := sorted(values - set(supported[argument])):
                raise ValueError(
                    f"initializer {name!r}: {argument}={', '.join(unknown)} is not supported: "
                    f"must be of {', '.join(supported[argument])}"
                )
        if options.has_core and base != "keep":
            raise ValueError(
                f"initializer {name!r}: base={base!r} is not supported for a method with a core: "
                "must be 'keep'"
            )
        _registry[name] = Initializer(
            name,
            function,
            options=options,
            paper=paper,
            base=base,
            preserves_output=preserves_output,
            reads=given["reads"],
            operations=given["operations"] | given["modules"],
            control=control,
        )
        return function

    return decorate


def _check_call(name: str, function: Method) -> None:
    """Raise if the function cannot be called with a layer and options."""
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"initializer {name!r}: {function.__qualname__}{inspect.signature(function)} is not "
            "supported: must take two arguments, (layer, options)"
        ) from error


def batched(function: Method) -> Method:
    """Mark a method that also accepts a stack of layers (see `lora_init.layer.Layer`).

    An accelerator then initializes layers of one shape in a single call.
    """
    function.is_batched = True
    return function


def workspace(*copies: Any) -> Callable[[Method], Method]:
    """State how much memory a method takes at its peak, for `Initializer.workspace`.

    Args:
        copies: float32 copies of the weight, and of the second moment of the inputs, measured at a
            rank far below the layer's sizes; or a function of the options that returns both.
    """

    def state(function: Method) -> Method:
        function.workspace = copies[0] if len(copies) == 1 else copies
        return function

    return state


def list_initializers(pattern: str = "*") -> list[Initializer]:
    """All registered initializers whose name matches the shell-style `pattern`, by name."""
    _METHODS.load()
    return [_registry[name] for name in sorted(fnmatch.filter(_registry, pattern))]


def get_initializer(name: str) -> Initializer:
    """Look up a registered initializer by name, in upper or lower case ("PiSSA", "LoRA-GA").

    Raises:
        ValueError: the name is unknown; the message suggests the nearest known name.
    """
    _METHODS.load()
    given, name = name, method_name(name)
    if name not in _registry:
        near = difflib.get_close_matches(name, _registry, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"init_lora_weights={given!r} is not a registered initializer: {hint}"
            f"Must be True (kaiming), False (random) or one of {', '.join(sorted(_registry))}"
        )
    return _registry[name]


def method_name(spelling: str) -> str:
    """The registered spelling of a method's name: "OLoRA" is "olora", "LoRA-GA" is "lora_ga"."""
    return spelling.lower().replace("-", "_")


def resolve(setting: Any) -> tuple[Initializer, Any]:
    """Turn a value of ``init_lora_weights`` into an initializer and its options.

    Args:
        setting: True (kaiming), False (random), a name (``"pissa"``, ``"pissa_niter_4"``), a
            mapping ``{"name": "pissa", "niter": 4}``, or an options instance, whose type
            determines the method.

    Raises:
        ValueError: the name or an option is unknown, or an option's value is not supported.
        TypeError: `setting` has another type.
    """
    _METHODS.load()
    if isinstance(setting, bool):
        setting = "kaiming" if setting else "random"
    if isinstance(setting, str):
        for spec in _registry.values():
            if (options := spec.options.from_name(method_name(setting))) is not None:
                return spec, options
        spec = get_initializer(setting)
        return spec, spec.options()
    if isinstance(setting, Mapping):
        values = dict(setting)
        if not isinstance(values.get("name"), str):
            raise ValueError(
                f"init_lora_weights={setting!r} is not supported: a mapping must have the key "
                "'name', e.g. {'name': 'pissa', 'niter': 4}"
            )
        spec = get_initializer(values.pop("name"))
        return spec, build_options(spec.options, values, f"init_lora_weights ({spec.name})")
    if is_dataclass(setting) and not isinstance(setting, type) and type(setting) is not Options:
        for spec in _registry.values():
            if spec.options is type(setting):
                return spec, setting
    raise TypeError(
        f"init_lora_weights={setting!r} of type {type(setting).__name__} is not supported: must "
        "be a bool, a name, a mapping with the key 'name', or a registered method's options"
    )


def build_options(options: type, values: Mapping[str, Any], setting: str) -> Any:
    """Make an options instance from a mapping; an unknown key raises ValueError."""
    known = [f.name for f in fields(options)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"{setting}: unknown option {key!r}; {hint}must be "
                f"{'one of ' + ', '.join(known) if known else 'left out: there are no options'}"
            )
    return options(**values)


def describe(spec: Initializer, options: Any) -> dict[str, Any]:
    """The mapping that `resolve` turns back into this method and these options."""
    return {"name": spec.name, **asdict(options)}
