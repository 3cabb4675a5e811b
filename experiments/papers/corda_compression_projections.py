"""Which components of a layer are the least: four answers, all of them projections of its weight.

With U the left singular vectors of W M (out × in times in × in, M regular), W = U Uᵀ W. An SVD of
W M that is cut and multiplied by M⁻¹ keeps U_k U_kᵀ W, since U_kᵀ W M = S_k V_kᵀ: no inverse is
needed. Dropping the q smallest leaves W - P Pᵀ W, with P the last q columns of U, and

    M = I             plain SVD: least ‖P Pᵀ W‖ (Frobenius);
    M = diag(mean |x|)^alpha   ASVD, equations 5-8; alpha = 0.5;
    M = R = XᵀX / tokens       CorDA, equations 2-4: what its initializer trains in its mode "kpm";
    M = L, R = L Lᵀ   whitened: left vectors are those of W R^(1/2), so that the mean of ‖P Pᵀ W x‖²
                      over the calibration data, tr(Pᵀ W R Wᵀ P), is the least there is (Eckart and
                      Young); SVD-LLM, section 3.2.

Deviations: CorDA's and SVD-LLM's own code damp R by its mean diagonal where they invert it; here
nothing is inverted, and R is lifted by the 1e-6 of it that `corda` lifts it by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import linalg
from lora_init.initializers.corda import NULL_SPACE_LIFT

METHODS = ("plain", "asvd", "corda", "whitened")


@dataclass(frozen=True)
class Inputs:
    """What calibration saw of one layer's inputs.

    Attributes:
        second_moment: R, float64.
        magnitude: mean |x| by feature, float64.
    """

    second_moment: Float[Tensor, "in in"]
    magnitude: Float[Tensor, " in"]


@dataclass(frozen=True)
class LeastComponents:
    """Components of a weight, the smallest first: the product of the first q is what q drop.

    Attributes:
        left: orthonormal columns, float32.
        projected: leftᵀ W, float32.
    """

    left: Float[Tensor, "out count"]
    projected: Float[Tensor, "count in"]

    def product(self, first: int, last: int) -> Float[Tensor, "out in"]:
        """Components first … last - 1."""
        return self.left[:, first:last] @ self.projected[first:last]


def least_components(
    weight: Float[Tensor, "out in"],
    method: str,
    inputs: Inputs | None,
    count: int,
    alpha: float = 0.5,
) -> LeastComponents:
    """The `count` smallest components by one of `METHODS`, decomposed in float64.

    All decompositions are of min(out, in) squared numbers: those of W M Mᵀ Wᵀ for a tall weight are
    taken in a basis of its columns.

    Args:
        inputs: None for "plain".
        count: 1 to min(out, in).
        alpha: of "asvd".
    """
    exact = weight.double()
    basis, core = None, exact
    if len(exact) > exact.shape[1]:
        basis, core = torch.linalg.qr(exact)
    if method == "corda":
        # Squared, its values would span more decades than float64 has: W R itself is decomposed.
        triangle = torch.linalg.qr((core @ lifted(inputs.second_moment)).mT, mode="r")[1]
        left = linalg.bottom_singular(triangle.mT, count, method="exact").left
    else:
        squared = weighted_square(core, method, inputs, alpha)
        left = linalg.top_eigen(squared, len(squared), method="exact")[1].flip(-1)[:, :count]
    if basis is not None:
        left = basis @ left
    return LeastComponents(left.float(), (left.mT @ exact).float())


def weighted_square(
    weight: Float[Tensor, "out in"], method: str, inputs: Inputs | None, alpha: float
) -> Float[Tensor, "out out"]:
    """W M Mᵀ Wᵀ, whose eigenvectors are the left singular vectors of W M."""
    if method == "plain":
        return weight @ weight.mT
    if method == "asvd":
        return (weight * inputs.magnitude ** (2 * alpha)) @ weight.mT
    if method == "whitened":
        return weight @ lifted(inputs.second_moment) @ weight.mT
    raise ValueError(f"method={method!r} is not supported: must be one of {', '.join(METHODS)}")


def lifted(moment: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    moment = moment.clone()
    moment.diagonal().add_(NULL_SPACE_LIFT * moment.diagonal().mean())
    return moment
