"""QPiSSA against LoftQ: how much of a 4-bit quantizer's error does an adapter remove at the start?

    reduction = 100 (1 - ‖W - (Q + s B A)‖ / ‖W - nf4(W)‖)    in percent, by default nuclear norms

LoftQ quantizes W and gives the adapter the best rank-r part of the error. QPiSSA gives the adapter
the best rank-r part of W and quantizes the rest, which is smaller. Both may alternate T times.
The paper finds PiSSA ahead of LoftQ at every T, T = 5 ahead of T = 1, and Q and K ahead of the MLP,
in nuclear norms averaged over the layers of Llama-2-7B at r = 128.

Measured: the same ratio for `loftq` and `qpissa` of this library, by layer, rank and T, also in the
Frobenius norm, the spectral norm and as the layer's output error on real inputs. Two references
put a figure into proportion. The first is the share that the top r directions of white noise of the
same shape hold, which is all that LoftQ can get from an error without structure. The second is the
share of ‖W‖ that W's own top r hold, by which QPiSSA's first step makes the weight smaller.
Controls show the effect of weights that are 4-bit values already.

Source: Meng et al. 2024, "PiSSA", arXiv 2404.02948, section on QPiSSA with its table of error
reduction ratios and the appendix on several iterations; Li et al. 2023, "LoftQ", arXiv 2310.08659.
"""

from .reproduction import REPRODUCTION

__all__ = ["REPRODUCTION"]
