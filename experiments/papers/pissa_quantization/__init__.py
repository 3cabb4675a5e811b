"""QPiSSA against LoftQ: how much of a 4-bit quantiser's error an adapter takes back at the start.

    reduction = 100 (1 - ‖W - (Q + s B A)‖ / ‖W - nf4(W)‖)    in per cent, by default nuclear norms

LoftQ quantises W and gives the adapter the best rank-r part of the error; QPiSSA gives the adapter
the best rank-r part of W and quantises what is left, which is smaller. Both may alternate T times.
The paper finds PiSSA ahead of LoftQ at every T, T = 5 ahead of T = 1, and Q and K ahead of the MLP,
in nuclear norms averaged over the layers of Llama-2-7B at r = 128.

Measured: the same ratio for `loftq` and `qpissa` of this library, by layer, rank and T, also in the
Frobenius norm, the spectral norm and as the layer's output error on real inputs. Two references
say what a figure is worth: what the top r directions of white noise of the same shape hold (all
that LoftQ could get from an error without structure), and the share of ‖W‖ that W's own top r hold
(what QPiSSA's first step makes smaller). Controls tell what weights that are 4-bit values already
do to such a comparison.

    settings      what is measured
    errors        norms of an error, and the error that a method leaves
    white_noise   the share of the top r directions of a matrix of noise
    grids         weights put on a 4-bit grid, and taken off it
    measuring     layers -> rows
    judging       rows -> claims
    tables, pictures, reproduction

Source: Meng et al. 2024, "PiSSA", arXiv 2404.02948, section on QPiSSA with its table of error
reduction ratios and the appendix on several iterations; Li et al. 2023, "LoftQ", arXiv 2310.08659.
"""

from .reproduction import PAPER

__all__ = ["PAPER"]
