"""Weights of mixture-of-experts modules that store all experts in one 3-D parameter per projection.

transformers 5 stores the experts of a layer like this. `gate_up_proj` holds two matrices of each
expert, gate and up, either concatenated or interleaved by row. It is read as one matrix.

| layout | `gate_up_proj` (or `up_proj`) | `down_proj` |
|---|---|---|
| standard | (experts, 2 · width, hidden) | (experts, hidden, width) |
| transposed, e.g. gpt-oss, Llama-4 | (experts, hidden, 2 · width) | (experts, width, hidden) |
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_init.weights.float import FloatFormat
from lora_init.weights.format import WEIGHT, Finding, class_names, register_weight_format
from lora_init.weights.offload import HOOK_ATTRIBUTES, absence

FIRST = ("gate_up_proj", "up_proj")
"""The parameter that reads the hidden states, with and without a gate."""

DOWN = "down_proj"

FORMER = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    DOWN: (("down_proj",), ("w2",)),
}
"""By parameter: the names of the linear modules that it replaced, in two families of models."""

ALL_TOKENS = "Llama4TextExperts"
"""The class whose experts all read every token. It has no router arguments."""

UNDECLARED = (ALL_TOKENS, "Step3p7Experts")
"""transformers' classes whose function is known, although they do not declare their layout."""

MXFP4 = "Mxfp4GptOssExperts"
"""transformers' class of experts in 4 bits. Its weights may be tensors of a kernel's library."""

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
"""The names of transformers' experts implementations that adapted experts follow."""

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ExpertsFormat(FloatFormat):
    """A module that stores its experts as 3-D parameters, recognized by its parameters.

    A matrix is a stack (experts, out, in). `orient` does not know the module, so use `stored`: it
    converts in both directions.
    """

    name = "Experts"
    operation = "routed"
    # The edits of a stack of matrices could not be undone one by one.
    subtractions = ("in_forward",)

    def base_class(self, module: nn.Module) -> type[nn.Module] | None:
        """The module's class, if the module has a first projection and `down_proj` in 3-D."""
        if MXFP4 in class_names(module):
            return type(module)
        parameters = dict(module._parameters)  # another class of mapping in a scripted module
        stacks = [parameters.get(name) for name in (*FIRST, DOWN)]
        found = [stack.shape for stack in stacks if stack is not None and stack.ndim == 3]
        is_pair = stacks[-1] is not None and len(found) == 2 and found[0][0] == found[1][0]
        return type(module) if is_pair else None

    def refusal(self, module: nn.Module) -> str | None:
        reason = self._reason(module)
        return None if reason is None else f"is a {type(module).__name__}, {reason}"

    def _reason(self, module: nn.Module) -> str | None:
        if MXFP4 in class_names(module):
            return (
                "which is not supported: its forward needs triton kernels on a GPU, which have no "
                "gradients. Load the model with quantization_config=Mxfp4Config(dequantize=True), "
                "or build it on the meta device and pass original_weights=<the checkpoint>"
            )
        if not hasattr(module, "is_transposed") and not class_names(module) & set(UNDECLARED):
            return (
                "which is not supported: its experts must declare their layout (`is_transposed`, "
                f"`has_gate`), as transformers' do, or be one of {', '.join(UNDECLARED)}"
            )
        if getattr(module, "_is_expert_parallel", False):
            return "whose experts are distributed over processes (expert parallelism)"
        for name in self.matrices(module):
            if (reason := unusable(module, name)) is not None:
                return reason
        return unknown_implementation(module)

    def replaced_forward(self, module: nn.Module) -> Finding | None:
        """A forward that was set on the instance is not run, except under Accelerate's hooks."""
        if "forward" not in vars(module) or hasattr(module, HOOK_ATTRIBUTES[0]):
            return None
        return Finding("adapted experts do not call it", False)

    def matrices(self, module: nn.Module) -> tuple[str, ...]:
        """The names of the two parameters."""
        if MXFP4 in class_names(module):
            return FIRST[0], DOWN
        return first_projection(module), DOWN

    def shape(self, module: nn.Module, name: str = WEIGHT) -> tuple[int, ...]:
        count, rows, columns = getattr(module, name).shape
        return (count, columns, rows) if is_transposed(module) else (count, rows, columns)

    def read(self, module: nn.Module, name: str = WEIGHT) -> Float[Tensor, "experts out in"]:
        return self.stored(module, getattr(module, name).detach())

    def orient(self, stored: Tensor) -> Float[Tensor, "experts out in"]:
        """Not supported, because the layout depends on the module."""
        raise TypeError(
            "the layout of experts depends on the module: call `stored(module, tensor)`"
        )

    def stored(
        self, module: nn.Module, weight: Float[Tensor, "experts rows columns"]
    ) -> Float[Tensor, "experts columns_or_rows rows_or_columns"]:
        """Convert a stack from (out, in) to the module's layout, or from that to (out, in)."""
        return weight.transpose(-2, -1) if is_transposed(module) else weight

    def float_dtype(self, module: nn.Module) -> torch.dtype:
        return getattr(module, DOWN).dtype

    def describe(self, module: nn.Module) -> str:
        return str(self.float_dtype(module)).removeprefix("torch.")

    def unwritable(self, module: nn.Module) -> str | None:
        return None


register_weight_format(ExpertsFormat())


def unusable(module: nn.Module, name: str) -> str | None:
    """Why the forward pass of an adapted module cannot use a parameter; None if it can."""
    parameter: Tensor = getattr(module, name)
    if parameter.dtype not in FLOAT_DTYPES:
        return f"whose {name} has dtype {parameter.dtype}: it must be 16-, 32- or 64-bit"
    where = None if parameter.is_meta else absence(parameter)
    return None if where is None else f"whose {name} is {where}"


def first_projection(module: nn.Module) -> str:
    """The name of the parameter that reads the hidden states."""
    return next(name for name in FIRST if module._parameters.get(name) is not None)


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores (experts, in, out).

    Modules that do not declare it are recognized by their shapes: `gate_up_proj` has twice as many
    outputs as `down_proj` has inputs.
    """
    declared = getattr(module, "is_transposed", None)
    if declared is not None:
        return declared
    first, down = getattr(module, first_projection(module)), getattr(module, DOWN)
    return first.shape[2] == 2 * down.shape[1] and first.shape[1] == down.shape[2]


def implementation(module: nn.Module) -> str:
    """The name of the experts implementation that the module's configuration selects."""
    if not hasattr(module, "is_transposed"):
        return IMPLEMENTATIONS[0]
    return getattr(module.config, "_experts_implementation", None) or IMPLEMENTATIONS[0]


def unknown_implementation(module: nn.Module) -> str | None:
    """Why adapted experts cannot follow the selected implementation; None if they can."""
    name = implementation(module)
    if name in IMPLEMENTATIONS:
        return None
    return (
        f"whose experts_implementation={name!r} is not supported: must be one of "
        f"{', '.join(IMPLEMENTATIONS)}. Call model.set_experts_implementation"
    )
