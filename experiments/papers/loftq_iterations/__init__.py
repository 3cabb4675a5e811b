"""LoftQ: what its iterations buy, what its order matters, and what a closed form does better.

LoftQ alternates Q = quant(W - s B A) and s B A = SVD_r(W - Q). Each iteration is meant to bring
Q + s B A nearer to W; what a model computes depends on W x, and QERA's authors show that the error
of the outputs need not fall with T. Their closed form takes the inputs' second moment R and leaves
a quantised layer the least output error that a correction of rank r can, for Q = quant(W). LoftQ's
authors compare the order: quantise first (LoftQ), or SVD first (QPiSSA's alternation, here ended on
an SVD too).

Measured, by bits, rank and T: the error of the weights, of the layers' outputs on held-out text,
and of the whole model with the chosen blocks replaced. An encoder in float32 carries the full grid
and a short fine-tuning from both orders at 2 bits, adapter and head; a language model the logit
error and the perplexities, by bits and rank.

    settings      what can be told
    errors        of one layer
    starts        the methods and the endings that are compared
    outputs       the whole model's error
    measuring     all starts of one model
    training      fine-tunings from both orders
    correlations  which error of the layers the model's goes with
    iterating     LoftQ's claims: iterations and order
    closed_form   QERA's claims
    showing       tables and figures
    reproducing   all of it, in order

Sources: Li et al. 2023, arXiv 2310.08659, algorithm 1 and the table of both orders; Zhang et al.
2024, arXiv 2410.06040, theorems 1 and 2, and its perplexities.
"""

from .reproducing import PAPER

__all__ = ["PAPER"]
