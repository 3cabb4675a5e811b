"""PiSSA by a fast SVD: error, time and training loss against the number of subspace iterations.

The paper replaces the full SVD of PiSSA by Halko's randomised one, `torch.svd_lowrank(W, q=r,
niter=N)`, and reports for N = 1 … 16 the time, an error and the loss at the end of training: at
r = 128 in Llama-2-7B 22.67 s (N = 16) against 435.8 s, an error of 1.93e-3 (N = 1) falling to
4.75e-4 (N = 16), and losses of .2301 (N = 1) and .2266 (N = 16) against .2264 from the full SVD.

Its error is "the sum of the absolute differences" of the factors from both decompositions; over how
many entries it is taken, and whether signs were aligned first, is not said, so that only its change
with N can be compared. Here there are four measures, all against the full SVD of the same matrix:

    difference   ‖s B A − s B* A*‖ / ‖s B* A*‖, of the products: what a model computes with
    excess       ‖W − s B A‖ / ‖W − s B* A*‖ − 1: what the product loses as an approximation
    entries      the mean absolute difference of the entries of A and B, signs aligned
    overlap      the mean squared cosine of the angles between the ranges of B and B*

Measured: `torch.svd_lowrank` with q = r, as the paper's code and PEFT call it, this library's
`pissa_niter_N` and `pissa`, and `torch.linalg.svd`, in turns, on the matrices of a real block and
on a synthetic one of a large model's size and a known power law; then short fine-tunings from
several N and from the exact triplets.

    settings       what is measured, and the paper's figures
    decomposing    weight -> factors, by every contender
    errors         factors -> how far they are from the exact ones
    measuring      matrices -> rows
    starts         fine-tunings -> rows
    judging        rows -> claims
    tables, pictures, reproduction

Source: Meng et al. 2024, "PiSSA", arXiv 2404.02948, section 3 and the appendix on fast SVD.
"""

from experiments.papers.fast_svd.reproduction import PAPER

__all__ = ["PAPER"]
