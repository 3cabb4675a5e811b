"""CorDA: does a model need the components that CorDA calls the smallest?

Every linear layer of the blocks loses its q smallest components. The perplexity on held-out text
measures the cost. Each method leaves a projection of the weight, W - P PᵀW. They differ in the q
output directions P that they call the smallest (see `projections`):

    plain SVD            left singular vectors of W
    ASVD                 of W diag(mean |x|)^alpha
    CorDA                of W R, R = X Xᵀ / tokens
    whitened             of W L, R = L Lᵀ; this P has the least mean square error of the output

Source: Yang et al. 2024, "CorDA", NeurIPS 2024, arXiv 2406.05223, table 1 and figure 2; Yuan et al.
2023, "ASVD", arXiv 2312.05821; Wang et al. 2024, "SVD-LLM", arXiv 2403.07378 (whitening).
"""

from .reproduction import REPRODUCTION

__all__ = ["REPRODUCTION"]
