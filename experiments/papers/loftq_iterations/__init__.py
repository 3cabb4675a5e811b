"""LoftQ and QERA: do LoftQ's iterations or its order matter, and is a closed form better?

LoftQ alternates Q = quant(W - s B A) and s B A = SVD_r(W - Q). Each iteration is meant to bring
Q + s B A nearer to W. The output of a model depends on W x, and QERA's authors show that the error
of the outputs need not fall with T. Their closed form reads the inputs' second moment R. For
Q = quant(W) it leaves the least output error that a correction of rank r can leave. LoftQ's
authors compare two orders: quantize first (LoftQ), or SVD first (QPiSSA's alternation, here with an
SVD at the end too).

Measured, by bits, rank and T: the error of the weights, of the layers' outputs on held-out text,
and of the whole model with quantized blocks. An encoder in float32 has the full grid and short
fine-tunings of adapter and head from both orders at 2 bits. A language model has the error of the
logits and the perplexities, by bits and rank.

Source: Li et al. 2023, arXiv 2310.08659, algorithm 1 and the table of both orders; Zhang et al.
2024, arXiv 2410.06040, theorems 1 and 2, and its perplexities.
"""

from .reproduction import REPRODUCTION

__all__ = ["REPRODUCTION"]
