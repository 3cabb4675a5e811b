"""EVA: A holds the directions in which a layer's inputs vary most.

The paper states that these directions explain most of the inputs' variance and that a few batches
find them. With them B receives the largest first gradient that an A with orthonormal rows can give
it, if the gradients of tokens are independent of the inputs. All are measured on films that EVA has
not seen. On its own inputs an A explains the variance by construction.

Source: Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation",
arXiv 2410.07170, theorems 3.1 and 3.2, algorithm 1 (tau), and the table of the initialization's
time.
"""

from .reproduction import REPRODUCTION

__all__ = ["REPRODUCTION"]
