"""Report linear weights that a selection does not adapt, with the reasons.

`"all-linear"` selects modules of supported classes. A list or an expression selects matching
modules. Neither selects experts stored in one parameter, or layers of an unknown quantized class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from lora_init.config.lora_config import ALL_LINEAR, HEADS, LoraConfig
from lora_init.plan.match import Selection, excluder, list_matcher, looks_linear, output_names
from lora_init.plan.new_weights import are_known, new_modules
from lora_init.plan.tables import grouped
from lora_init.weights.kinds import class_format, is_linear, is_router

# Name parts of tensors that multiply activations. Position tables, biases, scales and learned
# tokens can have two or three dimensions too.
_MATRIX = re.compile(r"weight|proj|kernel|router")
_NO_MATRIX = re.compile(
    r"bias|scale|zero|embed|pos|token|latent|query_|norm|conv|original\d|codebook"
)
_NO_LINEAR_CLASS = re.compile(r"Embed|Norm|Conv|Position")

_ROUTER = "a router; to adapt it, name it in target_modules, or set experts=True"

TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForImageClassification": "",
    "ForAudioClassification": "",
    "ForMultipleChoice": "",
}
"""By suffix of a model's class name: the task_type that trains its head, or ""."""


@dataclass(frozen=True)
class LeftOut:
    """A module or a parameter that gets no adapter.

    Attributes:
        name: qualified name.
        kind: "experts", "parameter", "head", or a module's class name.
        reason: why it is left out, and how to change that.
    """

    name: str
    kind: str
    reason: str


def left_out(model: nn.Module, config: LoraConfig, selection: Selection) -> list[LeftOut]:
    """All that a selection leaves out, except exclusions by the user or by PEFT's rules.

    Args:
        model: only its names, classes and shapes are read.
        config: the configuration of the selection.
        selection: the matched modules.
    """
    if config.target_modules == ALL_LINEAR:
        found = list(_all_linear(model, config, selection))
    else:
        found = list(_named(model, config, selection))
    return found + list(_untrained(model, config, selection))


def described(found: Iterable[LeftOut]) -> list[str]:
    """One line per reason, with layer numbers collapsed."""
    return by_reason((each.name, each.reason) for each in found)


def by_reason(found: Iterable[tuple[str, str]]) -> list[str]:
    """One line per reason for pairs of a name and a reason, with layer numbers collapsed."""
    reasons: dict[str, list[str]] = {}
    for name, reason in found:
        reasons.setdefault(reason, []).append(name)
    return [f"{', '.join(grouped(names))}: {reason}" for reason, names in reasons.items()]


def _all_linear(model: nn.Module, config: LoraConfig, selection: Selection) -> Iterator[LeftOut]:
    whole = [*selection.modules_to_save, *output_names(model, config)]
    passed = {*selection.names, *whole}
    inside = tuple(f"{name}." for name in whole)
    excluded = excluder(config.exclude_modules)
    for name, module in model.named_modules():
        known = name in passed or name.startswith(inside) or excluded(name)
        if known or is_linear(module):
            continue
        if is_router(module):
            yield LeftOut(name, type(module).__name__, _ROUTER)
            continue
        if looks_linear(module):
            inside += (f"{name}.",)  # one line for the module, none for its parts
            yield LeftOut(name, type(module).__name__, _unknown_class(module))
            continue
        stored = class_format(module)
        refusal = stored.refusal(module) if stored and stored.operation == "routed" else None
        if stored and refusal is not None:
            inside += (f"{name}.",)
            for matrix in stored.matrices(module):
                yield LeftOut(f"{name}.{matrix}", "experts", refusal)
            continue
        for part, tensor in _matrices(module):
            path = f"{name}.{part}".removeprefix(".")
            if not excluded(path) and path not in selection.experts:
                yield _parameter(path, tensor, module)


def _named(model: nn.Module, config: LoraConfig, selection: Selection) -> Iterator[LeftOut]:
    """Parameters that an entry of target_modules would match if they were modules."""
    meant = _meant(config)
    if meant is None:
        return
    candidates = {"", *selection.candidates} - {*selection.names}
    excluded = excluder(config.exclude_modules)
    for name, module in model.named_modules():
        if name not in candidates or is_linear(module) or excluded(name):
            continue
        for part, tensor in _matrices(module):
            path = f"{name}.{part}".removeprefix(".")
            is_adapted = path in selection.experts or excluded(path)
            if meant(path, tensor.ndim > 2) and not is_adapted:
                yield _parameter(path, tensor, module)


def _meant(config: LoraConfig) -> Callable[[str, bool], bool] | None:
    """A matcher of parameter names for the user's targets, or None if the user names none."""
    target = config.target_modules
    if target is None:
        return None
    if isinstance(target, str):
        matches = excluder(target, "target_modules")
    else:
        matches = list_matcher(target, config)
    return lambda path, stacked: any(map(matches, [path, *(_unfused(path) if stacked else [])]))


def _unfused(path: str) -> list[str]:
    """The names of unfused expert weights: "gate_up_proj" gives "gate_proj" and "up_proj"."""
    owner, _, last = path.rpartition(".")
    *firsts, end = last.split("_")
    return [f"{owner}.{first}_{end}" for first in firsts] if len(firsts) > 1 else []


def _matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's direct tensors that look like one or several linear weights."""
    if _NO_LINEAR_CLASS.search(type(module).__name__):
        return
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is None or _NO_MATRIX.search(name):
            continue
        matrix = tensor.ndim == 2 and min(tensor.shape) > 1
        stack = tensor.ndim == 3 or (tensor.ndim == 4 and "proj" in name)  # 4: packed in blocks
        if (stack and tensor.shape[0] > 1 and name in module._parameters) or (
            matrix and _MATRIX.search(name)
        ):
            yield name, tensor


def _unknown_class(module: nn.Module) -> str:
    return f"the class {type(module).__name__} is not supported"


def _parameter(path: str, tensor: Tensor, module: nn.Module) -> LeftOut:
    owner = type(module).__name__
    what = f"a parameter of {owner}"
    if tensor.ndim == 2:
        return LeftOut(path, "parameter", f"{what}; only linear modules are adapted")
    if "expert" in f"{path}{owner}".lower():
        fix = "to adapt it, name it in target_parameters, or set experts=True"
        return LeftOut(path, "experts", f"{what} with the weights of all experts; {fix}")
    return LeftOut(path, "parameter", f"{what} with a stack of weights; only modules are adapted")


def _untrained(model: nn.Module, config: LoraConfig, selection: Selection) -> Iterator[LeftOut]:
    """Frozen parts that are new or may be: weights missing from the checkpoint, a head."""
    used = [*selection.names, *selection.modules_to_save]

    def is_used(name: str) -> bool:
        return any(u == name or u.startswith(f"{name}.") or name.startswith(f"{u}.") for u in used)

    if are_known(model):
        for name in new_modules(model):
            if not is_used(name):
                yield LeftOut(name, type(model.get_submodule(name)).__name__, _new(name))
        return
    kind = type(model).__name__
    task = next((task for ending, task in TASKS.items() if ending in kind), None)
    if task is None:
        return
    for head in HEADS[task or "SEQ_CLS"]:
        module = getattr(model, head, None)
        has_weights = isinstance(module, nn.Module) and any(True for _ in module.parameters())
        if has_weights and not is_used(head):
            yield LeftOut(head, "head", _frozen_head(kind, head, task))


def _new(name: str) -> str:
    return (
        "its weights are new (not in the checkpoint) and stay frozen; to train it, add "
        f"{name.rpartition('.')[2]!r} to modules_to_save"
    )


def _frozen_head(kind: str, head: str, task: str) -> str:
    fix = f"set task_type={task!r}, or" if task else "set"
    return f"the head of {kind} stays frozen; if it is new, {fix} modules_to_save=[{head!r}]"
