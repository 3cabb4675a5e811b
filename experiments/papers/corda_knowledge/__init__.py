"""CorDA's knowledge-preserved mode: what does a model forget while it learns something else?

A model learns word problems. Its knowledge is measured on plots of films: forgetting is
KL(original ‖ trained) of the next token on held-out plots. "kpm" is calibrated on other plots and
trains what they use least. "ipm" is calibrated on the problems and trains what they use most. Both
are compared with LoRA's usual start, and with PiSSA where its rates are given.

A learning rate that suits one start is ten times too high for another, and a start that learns less
forgets less. So every start is trained at several rates, and forgetting is compared at an equal
amount learned: the point of each training where the loss on held-out problems has fallen by that
amount, at the best rate of each start. The first seed tries every rate, the others repeat the rates
that won with it.

Source: Yang et al. 2024, "CorDA", NeurIPS 2024, arXiv 2406.05223, section 4 (tables 2 and 3).
"""

from .reproduction import REPRODUCTION

__all__ = ["REPRODUCTION"]
