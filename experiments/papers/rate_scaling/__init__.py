"""Init[A] and Init[B]: how the learning rate must fall as a network grows wider.

One adapted layer z = W h + s B A h, h of width n. Init[A] draws A and sets B = 0, which is LoRA's
own start; Init[B] draws B and sets A = 0. Under Adam every entry of a factor moves by about the
learning rate η a step, in the direction of its gradient's sign, so what the factors do to a layer's
input is known up to constants:

                    A h             s B A h          A h and s B A h stay bounded for
    Init[A]         1 + η n         η (1 + η n)      s B A h: η ≤ n^(-1/2), where A h = n^(1/2)
    Init[B]         η n             η n (1 + η)      both: η ≤ n^(-1)

The paper concludes that Init[A] stands, and wants, a rate that falls as n^(-1/2), Init[B] one that
falls as n^(-1); that Init[A] therefore learns its features better; and that it pays with an
internal instability, A h growing as n^(1/2).

Measured on two teacher-student networks (`networks`), which differ in one thing. "square": the
adapted matrix is n × n and a readout with entries of 1/√n follows, as in the paper's simulation.
"narrow": the adapted matrix is m × n with m fixed, so that nothing behind the adapter grows: the
situation that the algebra above describes. In the square network B moves along the signs of the
readout's own entries, and n aligned entries of 1/√n add up to √n: there it is the loss that binds
Init[A], η² n · √n ≤ 1, so η ≤ n^(-3/4), while Init[B]'s random B adds up to 1 and keeps its n^(-1).

    networks    the frozen part, the data and the teacher; the two starts
    descent     Adam at all learning rates of a grid at once
    rates       the best and the largest stable rate of a grid
    scaling     every width, seed and start, as rows; exponents
    claims      verdicts
    charts      tables and figures

Source: Hayou, Ghosh & Yu 2024, "The Impact of Initialization on LoRA Finetuning Dynamics", arXiv
2406.08447, section 3.
"""

from __future__ import annotations

from experiments.papers.rate_scaling.scaling import RateScalingSettings, reproduce
from experiments.papers.reproduction import Paper

PAPER = Paper(
    name="rate_scaling",
    title="Init[A] and Init[B]: learning rates over the width",
    source="Hayou, Ghosh & Yu 2024, arXiv 2406.08447, section 3",
    question="Does the largest useful learning rate fall as n^(-1/2) where A starts at random, and "
    "as n^(-1) where B does?",
    settings=RateScalingSettings,
    reproduce=reproduce,
)

__all__ = ["PAPER"]
