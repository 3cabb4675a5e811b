"""Leading eigenvectors of a positive semi-definite map, from a block Krylov space.

With K the map and V an orthonormal basis of span{X, K X, K² X, …}, the largest eigenvalues of
``T = V^T K V`` approach K's as the basis grows, with eigenvectors V z. No method that only
multiplies by K gets more out of as many products. The basis is reorthogonalized in full, because
the three-term recurrence would lose orthogonality. After a few products it restarts from its best
vectors, so that the eigenproblem of T stays small.

The map is ``W^T W`` by products with W, a Gram matrix, an inverse, or a second moment.

Source: Musco & Musco 2015 (block Krylov); Wu & Simon 2000 (thick restart).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import dense
from lora_init.linalg.draws import Generators, normal_block
from lora_init.linalg.thin import thin_qr, unchecked_qr

OVERSAMPLING = 8
# Products before the first solution of the eigenproblem of T, and between two solutions.
FIRST_ROUND = 4
ROUND = 2
ROUNDS = 16
SPACE_SHARE = 0.6
"""A larger share of the whole space costs as much as a dense solver."""
TOLERANCE = 5e-5
"""The space ends when it expects to gain no more than this share of the squared error."""
ANGLE_TOLERANCE = 1e-4
"""With `each`, it ends when no vector's angle to its true direction is larger."""
START_SEED = 6718039795000161910
"""The seed without a generator. Results of earlier versions depend on it."""
ROUNDING = {torch.float32: 1e-7, torch.float64: 1e-14}
"""A gain below this share of ‖W‖² is rounding."""


@dataclass(frozen=True)
class Subspace:
    """Approximate leading eigenpairs.

    Attributes:
        values: (*stack, k), descending.
        vectors: (*stack, n, k), orthonormal columns in the precision they were computed in.
        missing: (*stack), the share of the trace that the values leave out.
        residuals: (*stack, k), ``‖K v_i - t_i v_i‖``.
        converged: whether the whole stack met the stopping rule.
    """

    values: Float[Tensor, "*stack k"]
    vectors: Float[Tensor, "*stack n k"]
    missing: Float[Tensor, "*stack"]
    residuals: Float[Tensor, "*stack k"]
    converged: bool

    def replaced(self, where: Tensor, other: Subspace) -> Subspace:
        """Return it with the results of `other` for some matrices of the stack."""
        return Subspace(
            torch.where(where[..., None], other.values, self.values),
            torch.where(where[..., None, None], other.vectors, self.vectors),
            torch.where(where, other.missing, self.missing),
            torch.where(where[..., None], other.residuals, self.residuals),
            self.converged,
        )


def block_width(rank: int, limit: int) -> int:
    """Return the columns of the test block: extra ones let the last wanted ones converge."""
    return min(rank + OVERSAMPLING, limit)


def start_block(
    shape: tuple[int, ...],
    width: int,
    generator: Generators | None,
    start: Tensor | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "*stack n width"]:
    """Return orthonormal columns: those of `start`, then random ones.

    They are drawn on the CPU in float32, with one generator per matrix, so that they depend on
    neither device, dtype nor the rest of the stack.
    """
    *stack, n = shape
    if generator is None:
        generator = torch.Generator().manual_seed(START_SEED)
    single = isinstance(generator, torch.Generator)
    drawn = [
        normal_block(n, width, generator=each) for each in ([generator] if single else generator)
    ]
    if all(one is drawn[0] for one in drawn):
        block = drawn[0].to(device, dtype)
        if start is None:  # orthonormalize once for the whole stack
            return thin_qr(block)[0].expand(*stack, n, width)
        block = block.expand(*stack, n, width)
    else:
        block = torch.stack(drawn).reshape(*stack, n, width).to(device, dtype)
    if start is not None:
        known = start[..., :width].to(block)
        block = torch.cat([known, block[..., known.shape[-1] :]], dim=-1)
    return thin_qr(block)[0]


def leading_eigenspace(
    multiply: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]],
    block: Float[Tensor, "*stack n width"],
    rank: int,
    *,
    half: bool = False,
    trace: Float[Tensor, "*stack"] | None = None,
    limit: int | None = None,
    each: bool = False,
    warm: bool = False,
    tolerance: float | None = None,
    rounds: int = ROUNDS,
    products: int = 0,
    careful: bool = False,
) -> Subspace | None:
    """Return the `rank` leading eigenpairs of a map, or None if its space would not be small.

    The stopping rule reads the residuals ``‖K v_i - t_i v_i‖``, which follow from the recurrence. A
    Ritz value t_i still grows by at most its residual, and by about residual² / gap near the end,
    where the gap is that to the first value outside the block. The sum of these growths must be
    below `tolerance` times the rest of the trace. With `each`, every residual must be below
    `tolerance` times its own gap (the sine of the vector's angle): a sum over a spectrum of many
    decades would ignore its small values.

    Args:
        multiply: (*stack, n, k) -> (*stack, n, k); with `half`, it returns ``(C X, K X)``.
        block: at least `rank` orthonormal columns to begin with, in the precision to work in.
        half: the map is ``K = C^T C``, and T is ``(C V)^T (C V)``. Values are then resolved down to
            the rounding of C instead of its square.
        trace: of the map. None: the sum of all Ritz values, a lower bound that makes the rule
            stricter.
        limit: the map's largest possible rank, if it is below n.
        warm: `block` is near the result: compute the residuals sooner.
        tolerance: None: the default of either rule.
        rounds: where to give up; see `Subspace.converged`.
        products: allow this many products between restarts, if they cost more than a long basis.
        careful: check every QR decomposition at once. Otherwise an accelerator is asked once per
            round, and if one was wrong, everything is computed again with care.
    """
    given = block
    *stack, n, width = block.shape
    kept = width + OVERSAMPLING
    first_round = ROUND if warm else FIRST_ROUND
    space = max(first_round * width, kept + ROUND * width)
    largest = int(SPACE_SHARE * min(n, limit or n))
    if space > largest:
        return None
    space = max(space, min(products * width, largest))
    if tolerance is None:
        tolerance = ANGLE_TOLERANCE if each else TOLERANCE
    basis = block.new_empty(*stack, n, space)
    images = None
    exact = torch.float64 if half else block.dtype
    projected = block.new_zeros(*stack, space, space, dtype=exact)
    noise = rounding_noise(block)
    scale = block.new_zeros(*stack, 1, 1)
    used = 0
    good: list[Tensor] = []

    def orthonormal(columns: Tensor) -> tuple[Tensor, Tensor]:
        if careful:
            return thin_qr(columns)
        found, triangle, right = unchecked_qr(columns)
        if right is not None:
            good.append(right)
        return found, triangle

    # A matrix of a stack keeps the result of the round in which it converged, as it would alone.
    finished = [False] * math.prod(stack)
    earlier: Subspace | None = None
    for round_ in range(rounds):
        # A long basis grows by a quarter at a time: each eigenproblem costs more than the last.
        added = max(ROUND, used // width // 4) if used else first_round
        for _ in range(min(added, (space - used) // width)):
            basis[..., used : used + width] = block
            old, used = used, used + width
            known = basis[..., :used]
            found = multiply(block)
            image, block = found if isinstance(found, tuple) else (None, found)
            coefficients = rows = known.mT @ block
            if image is not None:
                if images is None:
                    images = image.new_empty(*image.shape[:-1], space, dtype=exact)
                images[..., old:used] = image
                rows = images[..., :used].mT @ images[..., old:used]
            projected[..., old:used, :used] = rows.mT  # of V^T K V
            scale = torch.maximum(scale, coefficients.abs().amax((-2, -1), keepdim=True))
            size = scale  # of the products that were rounded
            if image is not None:
                size = scale.sqrt() * torch.linalg.vector_norm(image, dim=-2, keepdim=True)
            noise = noise.roll(1, dims=-2)  # shifted rows are new directions
            block, first = orthonormal(block - known @ coefficients + size * noise)
            # One projection leaves its own rounding behind; two are enough.
            block, second = orthonormal(block - known @ (known.mT @ block))
        if good and not bool(torch.stack(good).all()):
            return leading_eigenspace(
                multiply,
                given,
                rank,
                half=half,
                trace=trace,
                limit=limit,
                each=each,
                warm=warm,
                tolerance=tolerance,
                rounds=rounds,
                products=products,
                careful=True,
            )
        good.clear()
        values, vectors = dense.eigh(projected[..., :used, :used])
        values, vectors = values.flip(-1), vectors.flip(-1).to(block.dtype)
        # K V = V T + block (second first) E^T, where E is the last columns of the identity.
        last_block = vectors[..., -width:, :rank]
        residuals = (second @ first) @ last_block  # pyright: ignore  # set in the loop above
        residuals = torch.linalg.vector_norm(residuals, dim=-2).double()
        wanted = values[..., :rank].double()
        gaps = (wanted - values[..., kept : kept + 1].double()).clamp_min(0)
        total = values.sum(-1, dtype=torch.float64) if trace is None else trace
        missing = (total - wanted.sum(-1)).clamp_min(0)
        rounding = ROUNDING[block.dtype] * wanted[..., :1]
        if each:
            done = residuals <= torch.maximum(tolerance * gaps, rounding)
        else:
            if half:
                rounding = (rounding * ROUNDING[block.dtype] * wanted).sqrt()
            squares = residuals.square() / gaps.clamp_min(torch.finfo(gaps.dtype).tiny)
            growth = (torch.minimum(residuals, squares) - rounding).clamp_min(0)
            done = growth.sum(-1) <= tolerance * missing
        now_done = (done.all(-1) if each else done).flatten().tolist()
        new = [one and not other for one, other in zip(now_done, finished, strict=True)]
        converged = all(one or other for one, other in zip(new, finished, strict=True))
        last = converged or round_ == rounds - 1
        if last or any(new):
            share = missing / total.clamp_min(torch.finfo(total.dtype).tiny)
            now = Subspace(wanted, known @ vectors[..., :rank], share, residuals, converged)
            if earlier is not None:
                where = torch.tensor(finished, device=block.device).reshape(stack)
                now = now.replaced(where, earlier)
            earlier = now
            if last:
                return replace(now, converged=converged)
            finished = [one or other for one, other in zip(new, finished, strict=True)]
        if used + ROUND * width <= space:
            continue
        # Thick restart: the best Ritz vectors and the next block span the useful part of a longer
        # space, and the eigenproblem stays small.
        basis[..., :kept] = known @ vectors[..., :kept]
        if images is not None:
            images[..., :kept] = images[..., :used] @ vectors[..., :kept].to(exact)
        projected.zero_()
        projected.diagonal(dim1=-2, dim2=-1)[..., :kept] = values[..., :kept]
        used = kept
    raise AssertionError("the last round returns")


def rounding_noise(block: Tensor) -> Tensor:
    """Return random columns as small as a product's rounding.

    A product that lies in the known space leaves only rounding behind. Normalized, this rounding
    could repeat known vectors. The noise makes such columns random and changes nothing else.
    """
    n, width = block.shape[-2:]
    drawn = normal_block(n, width, generator=torch.Generator().manual_seed(1)).to(block)
    return drawn * (torch.finfo(block.dtype).eps / n**0.5)
