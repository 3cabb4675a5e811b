"""nn.MultiheadAttention with its input projection as a module, so that it can have an adapter.

torch's class stores the projection of queries, keys and values as a parameter, `in_proj_weight`
(3 embed_dim, embed_dim), and reads the weight of `out_proj` instead of calling it. Here both are
linear modules whose weights are read, so torch's forward pass and its fused kernels use the
effective weights of their adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_init.layers.base import LoraLayer
from lora_init.linalg.precision import full_precision
from lora_init.weights.offload import is_hooked


class SplitAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention that shares its parameters with `whole`, the original module.

    The projections are called only where a call differs from reading the weights: to observe their
    inputs, and for `lora_dropout`. The input projection is then called with each different tensor
    among query, key and value, so its inputs are the rows of all of them.
    """

    in_proj: Any  # a linear module, or its adapted layer

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        state = vars(whole)
        vars(self).update(state)
        for name in ("_parameters", "_buffers", "_modules"):
            vars(self)[name] = dict(state[name])
        self._whole = (whole,)  # a tuple, so that it is not a submodule
        columns = whole.embed_dim
        projection = nn.Linear(columns, 3 * columns, bias=False, device="meta")
        projection.train(whole.training)
        for name in ("weight", "bias"):
            projection.register_parameter(name, self._parameters.pop(f"in_proj_{name}"))
        self._modules = {"in_proj": projection, **self._modules}  # first, as in the forward pass

    @property
    def in_proj_weight(self) -> Tensor:
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        return self.in_proj.bias

    def joined(self) -> nn.MultiheadAttention:
        """The original module, with the present parameters."""
        whole: Any = self._whole[0]
        whole.in_proj_weight, whole.in_proj_bias = self.in_proj.weight, self.in_proj.bias
        whole.out_proj, whole.training = self.out_proj, self.training
        return whole

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's forward."""
        if any(map(_must_be_called, (self.in_proj, self.out_proj))):
            return self._called(query, key, value, *args, **kwargs)
        return super().forward(query, key, value, *args, **kwargs)

    def _called(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The forward pass that calls the projections.

        torch's function projects again, with identity matrices: that leaves the values unchanged.
        """
        projected: dict[int, Tensor] = {}
        parts = []
        for number, x in enumerate((query, key, value)):
            if id(x) not in projected:
                projected[id(x)] = self.in_proj(x)
            parts.append(projected[id(x)].chunk(3, dim=-1)[number])
        turned = self.batch_first and query.dim() == 3
        if turned:
            parts = [part.transpose(0, 1) for part in parts]
        queries, keys, values = parts
        identity = torch.eye(self.embed_dim, dtype=queries.dtype, device=queries.device)
        with full_precision():
            heads, weights = functional.multi_head_attention_forward(
                queries, keys, values, self.embed_dim, self.num_heads, None, None, self.bias_k,
                self.bias_v, self.add_zero_attn, self.dropout, identity, None,
                training=self.training,
                key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
                use_separate_proj_weight=True, q_proj_weight=identity, k_proj_weight=identity,
                v_proj_weight=identity, average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )  # fmt: skip
        return self.out_proj(heads.transpose(0, 1) if turned else heads), weights


def _must_be_called(projection: nn.Module) -> bool:
    if isinstance(projection, LoraLayer):
        return projection.drops() and projection.adapter_enabled and not projection.merged
    return is_hooked(projection)


def refusal(module: nn.Module) -> str | None:
    """Why the projections of an attention module cannot be adapted; None if they can."""
    if type(module) is not nn.MultiheadAttention:
        return f"is a {type(module).__name__}, a subclass of nn.MultiheadAttention"
    if not module._qkv_same_embed_dim:
        return (
            f"is a MultiheadAttention with kdim={module.kdim} and vdim={module.vdim}: both must be "
            f"embed_dim={module.embed_dim}"
        )
    if "forward" in vars(module) or "in_proj_weight" not in module._parameters:
        return "is a MultiheadAttention whose forward or weight was replaced"
    weight = module.in_proj_weight
    if weight.is_meta or type(weight.data).__name__ not in ("Tensor", "Parameter"):
        return "is a MultiheadAttention whose in_proj_weight is not in memory as a plain tensor"
    return None


def split(model: nn.Module, names: Iterable[str]) -> None:
    """Replace these attention modules by a `SplitAttention`.

    Raises:
        TypeError: a module is not supported. No module is replaced then.
    """
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    for name, module in modules.items():
        if (reason := refusal(module)) is not None:
            raise TypeError(
                f"target {name!r} {reason}, which is not supported. Leave it out with "
                "exclude_modules"
            )
    found = {id(module): SplitAttention(module) for module in modules.values()}
    _replace(model, found)


def join(model: nn.Module) -> None:
    """Replace each `SplitAttention` by its original module."""
    _replace(model, {id(part): part.joined() for part in attentions(model)})


def attentions(model: nn.Module) -> list[SplitAttention]:
    """The split attention modules of a model."""
    return [module for module in model.modules() if isinstance(module, SplitAttention)]


def _replace(model: nn.Module, wanted: Mapping[int, nn.Module]) -> None:
    """Replace modules everywhere, by id."""
    for parent in [*model.modules()] if wanted else ():
        for name, child in parent._modules.items():
            if id(child) in wanted:
                parent._modules[name] = wanted[id(child)]
