"""Find the rows of a layer's input that are unmasked tokens, where a model reshapes its tokens.

A mask has the shape (batch, time). Most layers read (batch, time, features). OPT's feed-forward
layers and mixtures of experts read (batch·time, features), in the same order. An expert reads the
rows routed to it. Their order cannot be recovered, so all of them count.
"""

from __future__ import annotations

import math
import re

import torch
from jaxtyping import Int
from torch import Tensor

GATHERED = re.compile(r"(^|\.)(?!\w*shared)\w*expert\w*\.\w+\.", re.IGNORECASE)
"""Matches layers inside one of several experts: "experts.3.w1", not "shared_expert.w1"."""

OTHER_INPUTS = re.compile(r"vision|visual|image|audio|speech|patch", re.IGNORECASE)
"""Layers whose flat inputs are not tokens, even if the number of rows matches by chance."""


class TokenRows:
    """Learn the layouts in which layers read their tokens while a model runs."""

    def __init__(self) -> None:
        self._flat: dict[str, bool] = {}

    def counted(
        self,
        reader: str,
        leading: torch.Size,
        shape: torch.Size | None,
        rows: Int[Tensor, " kept"] | None,
    ) -> Int[Tensor, " counted"] | None:
        """Return the indices of an input's rows that count; None if all count.

        Args:
            reader: the layer's name.
            leading: the input's shape without its features.
            shape: the mask's shape, (batch, time).
            rows: indices into the flattened mask of the positions that count; None if all do.
        """
        if shape is None:
            return None
        if leading[:2] == shape or (len(leading) == 3 and leading[::2] == shape):
            self._flat[reader] = False
            return _repeated(rows, leading, shape)
        # An expert or a table of relative positions reads a varying number of rows: those are not
        # flat tokens.
        flat = tuple(leading) == (math.prod(shape),) and self._flat.get(reader, True)
        self._flat[reader] = flat
        named = GATHERED.search(reader) or OTHER_INPUTS.search(reader)
        return rows if flat and not named else None


def _repeated(rows: Tensor | None, leading: torch.Size, shape: torch.Size) -> Tensor | None:
    """Repeat each token's rows for heads: (batch, time, heads) or (batch, heads, time)."""
    if rows is None or leading.numel() == shape.numel():
        return rows
    here = torch.zeros(shape.numel(), dtype=torch.bool, device=rows.device)
    here[rows] = True
    after = leading[:2] == shape
    there = here.view(*shape, *(1 for _ in leading[2:])) if after else here.view(shape)[:, None]
    return there.expand(leading).flatten().nonzero().squeeze(1)
