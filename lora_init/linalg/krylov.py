"""Leading eigenvectors of a positive semi-definite map from a block Krylov space.

With K the map and V an orthonormal basis of span{X, K X, K² X, …}, the eigenvalues of
``T = V^T K V`` grow towards K's as the basis does, and the vectors V z belong to them. No method
that only multiplies by K gets more out of as many products. The basis is kept orthogonal to
itself in full: the three-term recurrence would lose it; and it is restarted after a few products
from its best vectors, so that the eigenproblem of T stays small.

The map is ``W^T W`` by products with W, a Gram matrix at hand, its inverse (for the smallest ones),
or a second moment: the callers know, this file does not.

Source: Musco & Musco 2015 (block Krylov); Wu & Simon 2000 (thick restart).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import dense as small
from lora_init.linalg.dense import (
    ANGLE_TOLERANCE,
    FIRST_FORECAST,
    KRYLOV_ROUNDS,
    KRYLOV_TOLERANCE,
    OVERSAMPLING,
    ROUNDING,
    SPACE_SHARE,
    TREND,
)
from lora_init.linalg.draws import normal_block
from lora_init.linalg.thin import thin_qr, unchecked_qr

# Products before the first look at the eigenvalues, and in each round after it.
FIRST_ROUND = 4
ROUND = 2


@dataclass(frozen=True)
class Subspace:
    """Approximate leading eigenpairs.

    Attributes:
        values: (*stack, k), descending.
        vectors: (*stack, n, k), orthonormal columns in the precision they were computed in.
        missing: (*stack), the share of the trace that the values leave out.
        residuals: (*stack, k), ``‖K v_i - t_i v_i‖``.
        converged: whether the stopping rule was met by the whole stack.
    """

    values: Float[Tensor, "*stack k"]
    vectors: Float[Tensor, "*stack n k"]
    missing: Float[Tensor, "*stack"]
    residuals: Float[Tensor, "*stack k"]
    converged: bool

    def replaced(self, where: Tensor, other: Subspace) -> Subspace:
        """The same, with the results of `other` for some matrices of the stack."""
        return Subspace(
            torch.where(where[..., None], other.values, self.values),
            torch.where(where[..., None, None], other.vectors, self.vectors),
            torch.where(where, other.missing, self.missing),
            torch.where(where[..., None], other.residuals, self.residuals),
            self.converged,
        )


START_SEED = 6718039795000161910
"""Of the test block where no generator is passed. The results of earlier versions depend on it."""


def block_width(rank: int, limit: int, oversampling: int = OVERSAMPLING) -> int:
    """Columns of the test block: a few more than wanted let the last wanted ones converge."""
    return min(rank + oversampling, limit)


def start_block(
    shape: tuple[int, ...],
    width: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    start: Tensor | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "*stack n width"]:
    """Orthonormal columns: those of `start`, then random ones.

    Drawn on the CPU in float32, so that neither device nor dtype changes them, a generator for
    each matrix of the stack, so that neither does the stack.
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
        if start is None:  # orthonormalized once
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
    rounds: int = KRYLOV_ROUNDS,
    products: int = 0,
    foresee: bool = False,
    careful: bool = False,
) -> Subspace | None:
    """The `rank` leading eigenpairs of the map, or None where no space of them would be small.

    The stopping rule reads the residuals ``‖K v_i - t_i v_i‖``, which the recurrence gives for
    nothing. A Ritz value t_i still grows by no more than its residual, and by about residual² / gap
    once its vector has settled, the gap being that to the first value outside of the block. The
    sum of these must be below `tolerance` of the trace that is left. With `each`, every single
    residual must be below `tolerance` of its own gap (the sine of the vector's angle): for spectra
    of many decades, whose small values no sum can see.

    Args:
        multiply: (*stack, n, k) -> (*stack, n, k); with `half`, also what C makes of the block,
            before it.
        block: orthonormal columns to begin with, of the precision to work in; at least `rank`.
        half: the map is ``K = C^T C``, and `multiply` returns ``(C X, K X)``. T is then
            ``(C V)^T (C V)``: values down to the rounding of C are seen, and not of its square.
        trace: of the map. None: the sum of *all* Ritz values stands in for it, a lower bound, so
            that the rule only gets stricter.
        limit: the map's largest possible rank, where it is below n.
        warm: `block` is near the result: look at the residuals sooner.
        tolerance: None: the measured default of either rule.
        rounds: where to give up; the result says whether it has `converged`.
        products: so many may lie between two restarts, where a longer basis costs less than the
            products that it saves.
        foresee: with `each`, give up as soon as the residuals fall too slowly to come to rest in
            the rounds that are left.
        careful: check every QR decomposition at once. Otherwise an accelerator is asked once a
            round; where one was wrong, all is done again with care.
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
        tolerance = ANGLE_TOLERANCE if each else KRYLOV_TOLERANCE
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

    distances: list[float] = []
    # A matrix of a stack keeps the result of the round in which it converged, as it would alone.
    finished = torch.zeros(stack, dtype=torch.bool, device=block.device)
    earlier: Subspace | None = None
    for round_ in range(rounds):
        # Of a long basis a fourth is added at a time: each look costs more than the one before.
        added = max(ROUND, used // width // 4) if used else first_round
        for _ in range(min(added, (space - used) // width)):
            basis[..., used : used + width] = block
            old, used = used, used + width
            known = basis[..., :used]
            if half:
                image, block = multiply(block)
                if images is None:
                    images = image.new_empty(*image.shape[:-1], space, dtype=exact)
                images[..., old:used] = image
            else:
                block = multiply(block)
            coefficients = known.mT @ block
            rows = images[..., :used].mT @ images[..., old:used] if half else coefficients
            projected[..., old:used, :used] = rows.mT  # of V^T K V
            scale = torch.maximum(scale, coefficients.abs().amax((-2, -1), keepdim=True))
            size = scale  # of the products that were rounded
            if half:
                size = scale.sqrt() * torch.linalg.vector_norm(image, dim=-2, keepdim=True)
            noise = noise.roll(1, dims=-2)  # shifted rows are new directions
            block, first = orthonormal(block - known @ coefficients + size * noise)
            # Once leaves the rounding of the first projection behind, twice is enough.
            block, second = orthonormal(block - known @ (known.mT @ block))
        if good and not bool(torch.stack(good).all()):
            return leading_eigenspace(
                multiply, given, rank, half=half, trace=trace, limit=limit, each=each, warm=warm,
                tolerance=tolerance, rounds=rounds, products=products, foresee=foresee,
                careful=True,
            )  # fmt: skip
        good.clear()
        values, vectors = small.eigh(projected[..., :used, :used], UPLO="L")
        values, vectors = values.flip(-1), vectors.flip(-1).to(block.dtype)
        # K V = V T + block (second first) E^T, E being the last columns of the identity.
        residuals = (second @ first) @ vectors[..., -width:, :rank]
        residuals = torch.linalg.vector_norm(residuals, dim=-2).double()
        wanted = values[..., :rank].double()
        gaps = (wanted - values[..., kept : kept + 1].double()).clamp_min(0)
        total = values.sum(-1, dtype=torch.float64) if trace is None else trace
        missing = (total - wanted.sum(-1)).clamp_min(0)
        rounding = ROUNDING[block.dtype] * wanted[..., :1]
        hopeless = False
        if each:
            allowed = torch.maximum(tolerance * gaps, rounding)
            done = residuals <= allowed
            if foresee:
                distances.append(float((residuals / allowed).amax()))
                hopeless = too_slow(distances, rounds - round_ - 1)
        else:
            if half:
                rounding = (rounding * ROUNDING[block.dtype] * wanted).sqrt()
            squares = residuals.square() / gaps.clamp_min(torch.finfo(gaps.dtype).tiny)
            growth = (torch.minimum(residuals, squares) - rounding).clamp_min(0)
            done = growth.sum(-1) <= tolerance * missing
        new = (done.all(-1) if each else done) & ~finished
        converged, some = torch.stack([(new | finished).all(), new.any()]).tolist()
        last = converged or hopeless or round_ == rounds - 1
        if last or (stack and some):
            share = missing / total.clamp_min(torch.finfo(total.dtype).tiny)
            now = Subspace(wanted, known @ vectors[..., :rank], share, residuals, converged)
            earlier = now if earlier is None else now.replaced(finished, earlier)
            finished = finished | new
        if last:
            return dataclasses.replace(earlier, converged=converged)
        if used + ROUND * width <= space:
            continue
        # Thick restart: the best Ritz vectors and the next block span what a longer space would
        # have found useful, and the eigenproblem stays small.
        basis[..., :kept] = known @ vectors[..., :kept]
        if images is not None:
            images[..., :kept] = images[..., :used] @ vectors[..., :kept].to(exact)
        projected.zero_()
        projected.diagonal(dim1=-2, dim2=-1)[..., :kept] = values[..., :kept]
        used = kept
    raise AssertionError("the last round returns")


def too_slow(distances: Sequence[float], left: int) -> bool:
    """Whether the residuals' trend does not reach what is allowed in the rounds that are `left`.

    From one restart to the next they fall by the same factor, which the last `TREND` rounds tell
    once the first few have found where the spectrum begins.

    Args:
        distances: the largest residual after each round, as a multiple of the allowed one.
    """
    if len(distances) < FIRST_FORECAST or distances[-1] <= 1:
        return False
    level, before = math.log(distances[-1]), math.log(distances[-1 - TREND])
    return level - (before - level) / TREND * left > 0


def rounding_noise(block: Tensor) -> Tensor:
    """Random columns of the size of a product's rounding.

    Where the map has nothing more to say, what is left of a product is its rounding, which may lie
    in the known space; its normalised columns would repeat vectors that are there already. This
    much in random directions changes nothing else.
    """
    n, width = block.shape[-2:]
    drawn = normal_block(n, width, generator=torch.Generator().manual_seed(1)).to(block)
    return drawn * (torch.finfo(block.dtype).eps / n**0.5)
