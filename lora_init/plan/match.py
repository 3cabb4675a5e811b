"""Select the modules that get an adapter, with their ranks and alphas, by name.

The rules are PEFT's: exclusions first, then modules to save, then targets. Deviations:

- A layer list at the root of the model is found too.
- `modules_to_save` matches whole name parts.
- Entries that match nothing are reported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_init.config.lora_config import ALL_LINEAR, HEADS, LoraConfig
from lora_init.layers.attention import SplitAttention
from lora_init.plan.architectures import DEFAULT_TARGETS
from lora_init.plan.expert_names import meant, refuse_former_name
from lora_init.plan.parameters import fused_parameters, includes_experts, select_parameters
from lora_init.plan.patterns import Expression
from lora_init.plan.tables import listed
from lora_init.weights.format import WEIGHT
from lora_init.weights.kinds import is_linear, is_router


@dataclass(frozen=True)
class Selection:
    """The result of matching a configuration against a model.

    Attributes:
        names: qualified names of the modules to adapt, in model order.
        modules_to_save: qualified names of the modules to train whole.
        unmatched: (setting, entry) pairs that matched nothing.
        candidates: names of all modules that targets can match, those inside saved modules left
            out.
        experts: qualified names of the fused parameters of experts to adapt, in model order.
        implied, doubled: see `lora_init.plan.parameters.Parameters`.
    """

    names: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    unmatched: tuple[tuple[str, str], ...]
    candidates: tuple[str, ...]
    experts: tuple[str, ...] = ()
    implied: frozenset[str] = frozenset()
    doubled: frozenset[str] = frozenset()


def select(
    model: nn.Module, config: LoraConfig, modules_to_save: Iterable[str] | None = None
) -> Selection:
    """Match the configuration against the model's module names.

    Args:
        modules_to_save: full names of the modules to train whole, if a file lists them. None
            applies the configuration's rule.

    Raises:
        ValueError: nothing matches, a regular expression is invalid, the architecture has no
            default targets, or a module to save does not exist.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    names = list(modules)
    saved = _modules_to_save(names, config) if modules_to_save is None else list(modules_to_save)

    def inside(name: str) -> bool:
        """Whether a module is part of a saved module, which is trained as a whole."""
        return any(name == s or name.startswith(s + ".") for s in saved)

    target = config.target_modules
    if target is None:
        target = _defaults(model) if config.target_parameters is None else []
    former = None if target == ALL_LINEAR else _matcher(target, config)
    parameters = select_parameters(model, config, inside, former)
    unmatched = [("target_parameters", entry) for entry in parameters.unmatched]
    excluded = excluder(config.exclude_modules)
    candidates = [name for name in names if not inside(name)]
    experts = tuple(
        name
        for name in parameters.experts
        if not excluded(name) and not excluded(name.rpartition(".")[0])
    )
    if target == ALL_LINEAR:
        heads = output_names(model, config)
        suits = [is_linear, is_router] if includes_experts(model, config) else [is_linear]
        matched = [
            name
            for name in candidates
            if name not in heads and any(suited(modules[name]) for suited in suits)
        ]
    else:
        matches = _matcher(target, config)
        matched = [name for name in candidates if matches(name)]
        for entry in [] if isinstance(target, str) else target:
            if not any(name_matches(name, entry) for name in candidates):
                _refuse_parameter(model, entry)
                if any(meant(name, list_matcher([entry], config)) != "none" for name in experts):
                    continue
                unmatched.append(("target_modules", entry))
    matched = [name for name in candidates if name in {*matched, *parameters.modules}]
    chosen = [name for name in matched if not excluded(name)]
    unmatched += _unused_exclusions(config.exclude_modules, matched)
    for setting in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, setting) or {}:
            expression = _pattern_expression(setting, key)
            if not any(_selects(expression, name) for name in (*chosen, *experts)):
                unmatched.append((setting, key))
    if not chosen and not experts:
        raise ValueError(_nothing_matched(model, target, matched, config))
    chosen = dict.fromkeys(part for name in chosen for part in _parts(modules, name))
    return Selection(
        tuple(chosen),
        tuple(saved),
        tuple(unmatched),
        tuple(candidates),
        experts,
        parameters.implied,
        parameters.doubled,
    )


def _matcher(target: list[str] | str, config: LoraConfig) -> Callable[[str], bool]:
    """Match module names by a regular expression or a list."""
    if isinstance(target, str):
        expression = Expression("target_modules", target)
        return lambda name: expression.fullmatch(name) is not None
    return list_matcher(target, config)


def _parts(modules: Mapping[str, nn.Module], name: str) -> tuple[str, ...]:
    """The linear modules that a target stands for: both projections of an attention."""
    if isinstance(modules[name], SplitAttention):
        return f"{name}.in_proj", f"{name}.out_proj"
    return (name,)


def exactly(names: Iterable[str]) -> str:
    """A value of target_modules that selects exactly these modules."""
    return "|".join(re.escape(name) for name in names)


def portable_targets(chosen: Iterable[str], names: Iterable[str]) -> list[str] | str:
    """The shortest value of target_modules that selects `chosen` from `names`, also in PEFT.

    Uses last name parts ("q_proj") if they suffice, else whole names, else an expression. Whole
    names do not suffice for a root module whose name is a suffix of another module's name.
    """
    chosen = list(chosen)
    names = list(names)
    for entries in (list(dict.fromkeys(n.rpartition(".")[2] for n in chosen)), chosen):
        if [n for n in names if any(name_matches(n, entry) for entry in entries)] == chosen:
            return entries
    return exactly(chosen)


def name_matches(name: str, entry: str) -> bool:
    """Exact name or dotted suffix: "q_proj" matches "layers.0.q_proj", not "layers.0.seq_proj"."""
    return name == entry or name.endswith("." + entry)


class PatternValues:
    """Look up the value of the first pattern key that matches a name (PEFT's rule).

    Args:
        setting: "rank_pattern" or "alpha_pattern".
        patterns: the setting's value.
        default: the value for names that no key matches.
    """

    def __init__(self, setting: str, patterns: Mapping[str, Any] | None, default: Any) -> None:
        patterns = patterns or {}
        self._values = [(_pattern_expression(setting, key), patterns[key]) for key in patterns]
        self._default = default

    def matches(self, name: str) -> bool:
        """Whether any key matches the name."""
        return any(_selects(expression, name) for expression, _ in self._values)

    def __call__(self, name: str) -> Any:
        for expression, value in self._values:
            if _selects(expression, name):
                return value
        return self._default


def _selects(expression: Expression, name: str) -> bool:
    """Whether a key of a pattern matches the name of a module, or that of its weight.

    PEFT matches the name of the weight where `target_parameters` selects it.
    """
    return any(expression.match(one) for one in (name, f"{name}.{WEIGHT}"))


def pattern_value(setting: str, patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value for one name; see `PatternValues`."""
    return PatternValues(setting, patterns, default)(name)


def list_matcher(entries: Iterable[str], config: LoraConfig) -> Callable[[str], bool]:
    """Match names by a list of targets: exactly, or by suffix and layer index."""
    entries = set(entries)
    wanted = config.layers_to_transform
    indices = {wanted} if isinstance(wanted, int) else set(wanted or ())
    patterns = config.layers_pattern
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # The lazy optional prefix also finds a list at the root, which PEFT's expression cannot.
    expressions = [
        Expression("layers_pattern", pattern, r"(?:.*?\.)??(?:", r")\.(\d+)\.")
        for pattern in patterns or [r"[^.]*"]
    ]

    def matches(name: str) -> bool:
        if name in entries:
            return True
        suffix = any(name_matches(name, entry) for entry in entries)
        if not suffix or wanted is None:
            return suffix
        found = next((m for each in expressions if (m := each.match(name))), None)
        # Groups of the user's pattern come first.
        return found is not None and int(found[found.re.groups]) in indices

    return matches


def excluder(
    exclude: list[str] | str | None, setting: str = "exclude_modules"
) -> Callable[[str], bool]:
    """Match names by a list (exactly or by suffix) or by a regular expression."""
    if not exclude:
        return lambda name: False
    if isinstance(exclude, str):
        expression = Expression(setting, exclude)
        return lambda name: expression.fullmatch(name) is not None
    return lambda name: any(name_matches(name, entry) for entry in exclude)


def _pattern_expression(setting: str, key: str) -> Expression:
    return Expression(setting, key, r"(?:.*\.)?(?:", ")$")


def _unused_exclusions(
    exclude: list[str] | str | None, matched: list[str]
) -> list[tuple[str, str]]:
    entries = [exclude] if isinstance(exclude, str) else list(exclude or [])
    as_list = not isinstance(exclude, str)
    return [
        ("exclude_modules", entry)
        for entry in entries
        if not any(map(excluder([entry] if as_list else entry), matched))
    ]


def _modules_to_save(names: list[str], config: LoraConfig) -> list[str]:
    heads = HEADS.get(config.task or "", [])
    found = []
    for entry in config.modules_to_save or []:
        hits = [name for name in names if name_matches(name, entry)]
        if not hits and entry not in heads:  # PEFT's files list every possible head of the task
            raise ValueError(
                f"modules_to_save: no module is called {entry!r}; the model's last parts are "
                f"{_some({name.rsplit('.', 1)[-1] for name in names})}"
            )
        found += hits
    for entry in heads:
        found += [name for name in names if name_matches(name, entry)]
    return [
        name
        for name in dict.fromkeys(found)
        if not any(name.startswith(other + ".") for other in found)
    ]


def _defaults(model: nn.Module) -> list[str] | str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in DEFAULT_TARGETS:
        raise ValueError(
            f"target_modules=None has no defaults for model_type={kind!r}; name the modules, or "
            f"use 'all-linear'. Known: {', '.join(sorted(DEFAULT_TARGETS))}"
        )
    return DEFAULT_TARGETS[kind]


def output_names(model: nn.Module, config: LoraConfig) -> set[str]:
    """The output embedding or a classifier's head, which "all-linear" leaves out."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        output = get() if callable(get) else None
    except NotImplementedError:
        output = None
    if output is not None:
        return {name for name, module in model.named_modules() if module is output}
    classifies = config.task == "SEQ_CLS" or "ForSequenceClassification" in (type(model).__name__)
    names = [name for name, _ in model.named_modules()]
    heads = [n for n in names if any(name_matches(n, head) for head in HEADS["SEQ_CLS"])]
    inside = [n for n in names if any(n.startswith(head + ".") for head in heads)]
    return set(heads + inside) if classifies else set()


def _refuse_parameter(model: nn.Module, entry: str) -> None:
    """Raise if an entry names a parameter, or a module of one expert in older checkpoints.

    Raises:
        ValueError: with the parameter's name, shape and owner.
    """
    refuse_former_name(entry, list(fused_parameters(model)))
    for name, parameter in model.named_parameters():
        if not name_matches(name, entry):
            continue
        owner = name.rpartition(".")[0]
        shape = "×".join(map(str, parameter.shape))
        stacked = ", the weights of all experts in one tensor" if parameter.ndim == 3 else ""
        fix = f"name it in target_parameters=[{entry!r}]" if stacked else "leave it out"
        raise ValueError(
            f"target_modules: {entry!r} is not a module but a parameter, {name!r} of shape {shape} "
            f"in a {type(model.get_submodule(owner)).__name__}{stacked}; target_modules must name "
            f"modules, so {fix}"
        )


def _nothing_matched(model: nn.Module, target: Any, matched: list[str], config: LoraConfig) -> str:
    if matched:
        return (
            f"exclude_modules={config.exclude_modules!r} leaves nothing of target_modules="
            f"{target!r}, which matched {_some(matched)}"
        )
    if not target and config.target_parameters is not None:
        fused = {name.rpartition(".")[2] for name in fused_parameters(model)}
        known = f"its experts' are called {_some(fused)}" if fused else "it has no fused experts"
        return (
            f"target_parameters={config.target_parameters!r} matches no parameter of "
            f"{type(model).__name__}; {known}"
        )
    linear = {
        name.rsplit(".", 1)[-1] for name, module in model.named_modules() if is_linear(module)
    }
    layers = (
        f" with layers_to_transform={config.layers_to_transform!r}"
        if config.layers_to_transform is not None
        else ""
    )
    found = f"its linear modules there are called {_some(linear)}"
    if not linear:
        unknown = {type(module).__name__ for module in model.modules() if looks_linear(module)}
        found = "it has no linear module of a supported class"
        found += f", but modules of {_some(unknown)}" if unknown else ""
    return f"target_modules={target!r}{layers} matches no module of {type(model).__name__}; {found}"


def looks_linear(module: nn.Module) -> bool:
    """Whether a module has the attributes in_features and out_features."""
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes)


def _some(names: Iterable[str]) -> str:
    return listed(sorted(names), 12)
