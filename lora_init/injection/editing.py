"""A float weight plus or minus s B A, and the same bits whichever way it goes.

In the weight's own memory, some rows at a time, where nobody else could see that; else in new
memory, which the module is given, because the old one is another's, or a checkpoint mapped from
disk whose pages would be copied one by one on the first write (six times slower on MiniLM). New
memory is dear too: 46 MB take 11 ms to fill with a product where they have been in use and 24 to 46
where they are fresh (two virtual machines).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lora_init import fresh_memory
from lora_init.factors import low_rank_product
from lora_init.injection.exclusive import is_exclusive
from lora_init.injection.weights import store_weight
from lora_init.modules import oriented_weight, widened
from lora_init.precision import full_precision


@torch.no_grad()
def add_product(
    module: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, sign: Literal[1, -1]
) -> None:
    """Add ``sign · s B A`` to the float weight of `module`, rounded to its dtype.

    An interrupt leaves the weight as it was, but for the rounding of rows that were undone.
    """
    wide = torch.promote_types(widened(lora_A).dtype, widened(lora_B).dtype)
    devices = {lora_A.device.type, lora_B.device.type}
    own = devices == {"cpu"} and wide == module.weight.dtype and is_exclusive(module.weight)
    weight = oriented_weight(module)
    # Of a convolution in channels_last the matrix is a copy.
    if own and weight.data_ptr() == module.weight.data_ptr():
        _in_place(weight, lora_A, lora_B, scaling, sign)
        return
    weight = widened(weight)
    product = low_rank_product(lora_A, lora_B, scaling).to(weight.device)
    if product.dtype == weight.dtype:
        changed = torch.add(weight, product, alpha=sign, out=product)
    else:
        changed = torch.add(weight, product, alpha=sign)
    store_weight(module, changed)


def _in_place(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, sign: int) -> None:
    before = weight._version
    try:
        with full_precision():
            for part, product in fresh_memory.products(widened(lora_B) * scaling, widened(lora_A)):
                weight[part].add_(product, alpha=sign)
    except BaseException:
        # Counted by torch: a signal may arrive after an addition and before any line of ours.
        parts = weight._version - before
        done = min(len(weight), parts * fresh_memory.rows_together(weight.shape[1]))
        if done:
            _in_place(weight[:done], lora_A, lora_B[:done], scaling, -sign)
        raise
