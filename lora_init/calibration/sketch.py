"""Gradient sketches: the leading singular triplets of a gradient that is never stored.

With a Gaussian test block X (in × k), Q is an orthonormal basis of G X, improved by `POWERS` power
steps Q <- orth(G orth(Gᵀ Q)), and

    G ≈ Q (Qᵀ G) = U S Vᵀ,    k = wanted triplets + OVERSAMPLING.

A layer computes y = W x, so G X = sum g (xᵀ X) and Gᵀ Q = sum x (gᵀ Q): each is one pass over the
data and needs k columns instead of the whole matrix. A sketch takes 2 (POWERS + 1) passes and
4 k (in + out) bytes per layer instead of 4 in · out. All passes must see the same batches.

Error (Halko, Martinsson & Tropp 2011, corollary 10.10): with r = k - p, p = OVERSAMPLING and
q = POWERS, the expected spectral norm of G - Q Qᵀ G is at most

    (1 + sqrt(r / (p - 1)) + e sqrt(k) / p · sqrt(min(in, out) - r))^(1 / (2 q + 1)) σ_(r+1).

A gradient of rank at most k has no error beyond rounding.

Source: BackPropRSVD in Bogachev et al., "LoRA meets Riemannion: Muon Optimizer for
Parametrization-independent Low-Rank Adapters" (first "RiemannLoRA"), ICLR 2026, arXiv 2507.12142.
Deviations: the authors attach zero-valued adapters, whose gradients are the two products. This code
sums the products in the backward hooks of `lora_init.calibration.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_init import linalg
from lora_init.calibration.gradients import Factor, collect_gradients, own_loss
from lora_init.calibration.places import placed
from lora_init.layer import layer_generator
from lora_init.linalg.moments import GradientSketch
from lora_init.linalg.precision import full_precision, wide
from lora_init.registry import POWERS


def sketch_gradients(
    model: nn.Module,
    sizes: Mapping[str, int],
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Tensor] = own_loss,
    device: torch.device | None = None,
) -> dict[str, GradientSketch]:
    """The leading triplets of each layer's mean gradient, as of `collect_gradients`.

    Args:
        model, loss, device: as for `collect_gradients`.
        sizes: k by layer name.
        batches: a list or a loader, which is read 2 (POWERS + 1) times.

    Raises:
        ValueError: as `collect_gradients`, or the batches can be read only once.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"calibration: sketches of gradients take {2 * (POWERS + 1)} passes over the batches, "
            "and a generator can be read only once; pass a list or a loader, or a larger "
            "calibration_memory"
        )

    def products(blocks: Mapping[str, Tensor], *, transposed: bool) -> dict[str, Tensor]:
        factors = {name: Factor(block, transposed) for name, block in blocks.items()}
        return collect_gradients(model, sizes, batches, loss=loss, device=device, factors=factors)

    blocks = {}
    for name, place in placed(model, sizes).items():
        size, columns = sizes[name], place.shape[1]
        blocks[name] = torch.randn(columns, size, generator=layer_generator(0, name))
    bases = _bases(products(blocks, transposed=False))
    for _ in range(POWERS):
        blocks = _bases(products(bases, transposed=True))
        bases = _bases(products(blocks, transposed=False))
    images = products(bases, transposed=True)
    return {name: _sketch(bases[name], images.pop(name)) for name in sizes}


def _bases(blocks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Orthonormal bases of the blocks' columns, which are released one by one."""
    with full_precision():
        return {name: _basis(blocks.pop(name)) for name in list(blocks)}


def _basis(block: Tensor) -> Tensor:
    # Scaled first: float32 products of tiny gradients would underflow in the decomposition.
    scale = block.abs().max().clamp_min(torch.finfo(block.dtype).tiny)
    return linalg.thin_qr(wide(block / scale))[0].to(block.dtype)


def _sketch(basis: Tensor, image: Tensor) -> GradientSketch:
    """U, S, V of Q (Gᵀ Q)ᵀ."""
    with full_precision():
        right, values, turns = linalg.thin_svd(wide(image))
        left = basis.to(turns.device).double() @ turns.mT
    return GradientSketch(left.float(), values.float(), right.float())
