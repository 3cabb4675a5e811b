"""A float weight plus or minus s B A, with the same bits in its own memory and in new memory.

The weight is changed in its own memory where no other tensor shows that memory. Otherwise the
module gets new memory: the old one belongs to another tensor, or is a checkpoint mapped from disk,
whose pages the first write would copy one by one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lora_init.factors import low_rank_product, widened
from lora_init.injection.exclusive import is_exclusive
from lora_init.injection.transaction import Transaction
from lora_init.injection.weights import store_weight
from lora_init.linalg.matrix import products, rows_together
from lora_init.linalg.precision import full_precision
from lora_init.weights.kinds import oriented_weight


@torch.no_grad()
def add_product(
    module: nn.Module,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    sign: Literal[1, -1],
    transaction: Transaction | None = None,
) -> None:
    """Add ``sign · s B A`` to the float weight of `module`, rounded to its dtype.

    An interrupt leaves the weight as it was, but for the rounding of rows that were undone.

    Args:
        transaction: takes the product off again where a later change fails.
    """
    edit = _Edit(module, lora_A, lora_B, scaling, sign)
    if transaction is not None:
        transaction.undo_by(edit.undo)
    try:
        edit.make()
    except BaseException:
        edit.undo()
        raise


class _Edit:
    """A product that is added to a weight, and taken off again as far as it was added.

    While it is being added, the weight says how far: it has another address, or torch has counted
    the parts that were written. A signal may arrive after an addition and before any line of ours.
    """

    def __init__(
        self, module: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, sign: int
    ) -> None:
        self.module = module
        self.factors = lora_A, lora_B, scaling
        self.sign = sign
        self._begin()

    def _begin(self) -> None:
        weight = self.module.weight
        # No reference to the memory is kept: its holders are counted.
        self.address = weight.data_ptr()
        self.version = None if weight.is_inference() else weight._version
        self.is_made = False

    def make(self) -> None:
        lora_A, lora_B, scaling = self.factors
        module = self.module
        wide = torch.promote_types(widened(lora_A).dtype, widened(lora_B).dtype)
        devices = {lora_A.device.type, lora_B.device.type}
        own = devices == {"cpu"} and wide == module.weight.dtype and is_exclusive(module.weight)
        weight = oriented_weight(module)
        # Of a convolution in channels_last the matrix is a copy.
        if own and weight.data_ptr() == module.weight.data_ptr():
            _add_in_place(weight, lora_A, lora_B, scaling, self.sign)
        else:
            weight = widened(weight)
            product = low_rank_product(lora_A, lora_B, scaling).to(weight.device)
            out = {"out": product} if product.dtype == weight.dtype else {}
            store_weight(module, torch.add(weight, product, alpha=self.sign, **out))
        self.is_made = True

    @torch.no_grad()
    def undo(self) -> None:
        """Take off what was added since this edit began; nothing is left to undo afterwards."""
        weight = self.module.weight
        if self.is_made or weight.data_ptr() != self.address:
            inverse = _Edit(self.module, *self.factors, -self.sign)
            try:
                inverse.make()
            except BaseException:
                inverse.undo()
                raise
        elif self.version is not None and weight._version != self.version:
            parts, start = weight._version - self.version, weight._version
            try:
                self._add_parts(parts, -self.sign)
            except BaseException:
                self._add_parts(weight._version - start, self.sign)
                self.version = weight._version - parts
                raise
        self._begin()

    def _add_parts(self, parts: int, sign: int) -> None:
        """Add the product to the first `parts` parts of the weight."""
        lora_A, lora_B, scaling = self.factors
        matrix = oriented_weight(self.module)
        rows = min(len(matrix), parts * rows_together(matrix.shape[1]))
        if rows:
            _add_in_place(matrix[:rows], lora_A, lora_B[:rows], scaling, sign)


def _add_in_place(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, sign: int
) -> None:
    with full_precision():
        for part, product in products(widened(lora_B) * scaling, widened(lora_A)):
            weight[part].add_(product, alpha=sign)
