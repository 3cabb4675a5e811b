"""CorDA: the components it calls the smallest are those that a model can do without.

Every linear layer of the blocks loses its q smallest components, and the perplexity on held-out
text says what that cost. All methods compared leave a projection of the weight, W - P P'W, and
differ in which q output directions P they take for the least (`projections`):

    plain SVD            left singular vectors of W
    ASVD                 of W diag(mean |x|)^alpha
    CorDA                of W R, R = XX'/tokens
    whitened             of W L, R = LL': for these P the mean square error of the output is least

    projections   which components are the least, by method
    inputs        what calibration saw of each layer's inputs
    dropping      perplexity as more and more components are dropped
    claims        the paper's statements and their verdicts
    figures       table and charts
    reproduction  settings, and the way through all of it

Source: Yang et al. 2024, "CorDA", NeurIPS 2024, arXiv 2406.05223, table 1 and figure 2; Yuan et al.
2023, "ASVD", arXiv 2312.05821; Wang et al. 2024, "SVD-LLM", arXiv 2403.07378 (whitening).
"""

from .reproduction import PAPER

__all__ = ["PAPER"]
