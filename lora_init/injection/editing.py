"""Add s B A to a float weight or subtract it, with the same bits in place and in new memory.

The weight is edited in place if no other tensor uses its memory. Otherwise the module gets new
memory. The old memory may belong to another tensor, or to a checkpoint mapped from disk, which an
in-place write would copy page by page.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_init.factors import low_rank_product
from lora_init.injection.exclusive import is_exclusive
from lora_init.injection.transaction import Transaction
from lora_init.linalg.matrix import products, rows_together, widened
from lora_init.linalg.precision import full_precision
from lora_init.weights.kinds import known_format, oriented_weight


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

    If an interrupt arrives, the weight is restored, up to rounding in rows that were undone.

    Args:
        transaction: records how to subtract the product if a later change fails.
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
    """An addition to a weight that can be undone even if it was interrupted.

    The progress is read from the weight: its address changes, or torch's version counter counts
    the parts written. A signal can arrive after an addition and before the next Python line.
    """

    def __init__(
        self, module: Any, lora_A: Tensor, lora_B: Tensor, scaling: float, sign: int
    ) -> None:
        self.module = module
        self.factors = lora_A, lora_B, scaling
        self.sign = sign
        self._begin()

    def _begin(self) -> None:
        weight = self.module.weight
        # Do not keep a reference: `is_exclusive` counts the references to the memory.
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
        # For a channels_last convolution the matrix is a copy.
        if own and weight.data_ptr() == module.weight.data_ptr():
            _add_in_place(weight, lora_A, lora_B, scaling, self.sign)
        else:
            weight = widened(weight)
            product = low_rank_product(lora_A, lora_B, scaling).to(weight.device)
            out = {"out": product} if product.dtype == weight.dtype else {}
            total = torch.add(weight, product, alpha=self.sign, **out)
            known_format(module).write(module, total)
        self.is_made = True

    @torch.no_grad()
    def undo(self) -> None:
        """Undo what was added since this edit began. A second call changes nothing."""
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
