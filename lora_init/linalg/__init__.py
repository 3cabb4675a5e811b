"""Partial decompositions: only the few singular triplets that an initializer needs.

All functions are seeded (test blocks are drawn on the CPU) and free of global state. They accept
one matrix, a stack of equal shapes, or a product that is never formed. The same call on the same
device gives the same bits. The last bits may differ between devices, numbers of threads, versions
of torch and, on an accelerator, with the other members of a stack.
"""

from lora_init.linalg.bottom import bottom_singular
from lora_init.linalg.decomposition import LEAST_TRIPLETS, Decomposition, fix_signs, nesting_rank
from lora_init.linalg.eigen import bottom_eigen, top_eigen
from lora_init.linalg.matrix import frobenius_norm
from lora_init.linalg.operators import Operator
from lora_init.linalg.singular import ITERATIONS, METHODS, QUALITY, top_singular
from lora_init.linalg.thin import leading_qr, thin_qr, thin_svd

__all__ = [
    "ITERATIONS",
    "LEAST_TRIPLETS",
    "METHODS",
    "QUALITY",
    "Decomposition",
    "Operator",
    "bottom_eigen",
    "bottom_singular",
    "fix_signs",
    "frobenius_norm",
    "leading_qr",
    "nesting_rank",
    "thin_qr",
    "thin_svd",
    "top_eigen",
    "top_singular",
]
