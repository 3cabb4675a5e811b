"""CorDA's knowledge-preserved mode: what is forgotten while something else is learnt.

A model learns word problems. Its knowledge, as far as it is measured here, are plots of films:
forgetting is KL(original ‖ trained) of the next token on held-out plots. "kpm" is calibrated on
other plots and trains what they use least; "ipm" is calibrated on the problems and trains what they
use most; they are held against LoRA's usual start, and against PiSSA where its rates are given.

A learning rate that suits one start is ten times too high for another, and who learns less forgets
less. So every start is trained at several rates, and forgetting is compared where all have learnt
the same: along each training, it is read off where the loss on held-out problems has fallen by one
amount, and each start has its best rate. The first seed tries every rate, the others repeat those
that won with it.

    trajectories   one training: learnt and forgotten as it goes on
    tradeoff       forgetting at one amount learnt, and the rates that win
    claims         the paper's statements and their verdicts
    figures        tables and charts
    reproduction   settings, and the way through all of it

Source: Yang et al. 2024, "CorDA", NeurIPS 2024, arXiv 2406.05223, section 4 (tables 2 and 3).
"""

from .reproduction import PAPER

__all__ = ["PAPER"]
