"""Linear maps that are known by their products, and what a decomposition accepts.

A decomposition costs as much as its readings of W. A step of W^T W needs two products, W X and
W^T (W X). `round_trip` computes both from one reading: it takes a few rows of W at a time, while
they are in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.linalg import mixed_products
from lora_init.linalg.mixed_products import SIXTEEN_BITS

# `round_trip` takes as many rows at a time as fill this part of a core's cache, but at least 64.
CACHED_BYTES = 2**19
LEAST_ROWS = 64
SHARED_NUMBERS = 2**22  # a matrix with fewer numbers is not worth starting threads


@dataclass(frozen=True)
class Operator:
    """A linear map, or a stack of maps of one shape, known by its products only.

    Attributes:
        shape: (*stack, m, n).
        matmul: (*stack, n, k) -> (*stack, m, k).
        rmatmul: (*stack, m, k) -> (*stack, n, k), the product with the transpose.
        dtype: of the blocks, float32 or float64.
        device: of the blocks.
        upcast: returns the same map in float64, for spectra that float32 cannot resolve.
        factors: the two matrices of a product; `bottom_singular` inverts them one by one.
        matrix: the matrix of a dense map; it may have 16 bits where `dtype` is float32.
        members: returns the maps of a stack one by one.
        both: (*stack, n, k) -> (matmul(block), rmatmul(matmul(block))); None: one after the other.
    """

    shape: tuple[int, ...]
    matmul: Callable[[Tensor], Tensor]
    rmatmul: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    device: torch.device
    upcast: Callable[[], Operator] | None = None
    factors: tuple[Tensor, Tensor] | None = None
    matrix: Tensor | None = None
    both: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    members: Callable[[], Sequence[Operator]] | None = None

    @classmethod
    def product(
        cls, first: Float[Tensor, "*stack m j"], second: Float[Tensor, "*stack j n"]
    ) -> Operator:
        """Return the map ``x -> first (second x)`` without forming the product.

        Raises:
            ValueError: the inner dimensions or the dtypes differ.
        """
        if min(first.ndim, second.ndim) < 2 or first.shape[-1] != second.shape[-2]:
            raise ValueError(
                f"Operator.product got shapes {tuple(first.shape)} and {tuple(second.shape)}: they "
                "must be (m, j) and (j, n) with the same j, or stacks of such matrices."
            )
        if first.dtype != second.dtype:
            raise ValueError(
                f"Operator.product got dtypes {first.dtype} and {second.dtype}: they must be "
                "equal. Cast one matrix."
            )

        def both(block: Tensor) -> tuple[Tensor, Tensor]:
            image, back = round_trip(first, second @ block)
            return image, transposed_product(second, back)

        def members() -> list[Operator]:
            return [cls.product(*pair) for pair in zip(first, second, strict=True)]

        stack = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
        return cls(
            shape=(*stack, first.shape[-2], second.shape[-1]),
            matmul=lambda block: first @ (second @ block),
            rmatmul=lambda block: transposed_product(second, transposed_product(first, block)),
            dtype=first.dtype,
            device=first.device,
            upcast=lambda: cls.product(first.double(), second.double()),
            factors=(first, second),
            both=both,
            members=members if first.ndim == second.ndim == 3 else None,
        )

    @classmethod
    def dense(cls, matrix: Float[Tensor, "*stack m n"]) -> Operator:
        """Return ``x -> matrix x``; for a 16-bit matrix in float32, without a copy if possible."""
        upcast = lambda: cls.dense(matrix.double())  # noqa: E731
        shape, device = tuple(matrix.shape), matrix.device
        if mixed_products.has_mixed_products(matrix):
            return cls(
                shape=shape,
                matmul=lambda block: mixed_products.product(matrix, block),
                rmatmul=lambda block: mixed_products.transposed_product(matrix, block),
                dtype=torch.float32,
                device=device,
                upcast=upcast,
                matrix=matrix,
            )
        wide = matrix.float() if mixed_products.is_narrow(matrix.dtype) else matrix
        return cls(
            shape=shape,
            matmul=lambda block: wide @ block,
            rmatmul=lambda block: transposed_product(wide, block),
            dtype=wide.dtype,
            device=device,
            upcast=upcast,
            matrix=wide,
            both=lambda block: round_trip(wide, block),
        )

    @property
    def transpose(self) -> Operator:
        """The map ``x -> matrix.T x``."""
        *stack, m, n = self.shape
        upcast = self.upcast
        return Operator(
            shape=(*stack, n, m),
            matmul=self.rmatmul,
            rmatmul=self.matmul,
            dtype=self.dtype,
            device=self.device,
            upcast=None if upcast is None else lambda: upcast().transpose,
            matrix=None if self.matrix is None else self.matrix.mT,
        )

    def there_and_back(
        self, block: Float[Tensor, "*stack n k"]
    ) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack n k"]]:
        """Return ``matrix block`` and ``matrix.T matrix block``."""
        if self.both is not None:
            return self.both(block)
        image = self.matmul(block)
        return image, self.rmatmul(image)

    def widened(self) -> Operator:
        """Return the same map in float64 if it has one, else itself."""
        return self if self.upcast is None else self.upcast()

    def to_dense(self) -> Float[Tensor, "*stack m n"]:
        """Return the matrix. A map without factors is applied to an identity matrix."""
        if self.matrix is not None:
            return self.matrix.to(self.dtype)
        if self.factors is not None:
            first, second = self.factors
            return first @ second
        *stack, m, n = self.shape
        identity = torch.eye(min(m, n), dtype=self.dtype, device=self.device)
        identity = identity.expand(*stack, -1, -1)
        return self.matmul(identity) if n <= m else self.rmatmul(identity).mT


def transposed_product(
    matrix: Float[Tensor, "*stack m n"], block: Float[Tensor, "*stack m k"]
) -> Float[Tensor, "*stack n k"]:
    """Return ``matrix^T block``, reading a row-major matrix in the order of its memory."""
    return (block.mT @ matrix).mT


def round_trip(
    matrix: Float[Tensor, "*stack m n"], block: Float[Tensor, "*stack n k"]
) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack n k"]]:
    """Return ``matrix block`` and ``matrix^T matrix block``, on a CPU from one reading of W."""
    single = matrix.ndim == block.ndim == 2 and matrix.device.type == "cpu"
    if not single or matrix.stride(-1) != 1 or matrix.nbytes < 4 * CACHED_BYTES:
        image = matrix @ block
        return image, transposed_product(matrix, image)
    image = block.new_empty(matrix.shape[0], block.shape[1])
    threads = torch.get_num_threads()
    if threads == 1 or matrix.numel() < SHARED_NUMBERS:
        return image, _by_rows(matrix, block, image)
    parts = zip(matrix.tensor_split(threads), image.tensor_split(threads), strict=True)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        sums = list(pool.map(lambda part: _by_rows(part[0], block, part[1]), parts))
    torch.set_num_threads(threads)  # new threads inherit the number that any thread set last
    return image, torch.stack(sums).sum(0)


@torch.no_grad()
def _by_rows(matrix: Tensor, block: Tensor, image: Tensor) -> Float[Tensor, "n k"]:
    """Fill `image` with ``matrix block``, some rows at a time, and return ``matrix^T image``."""
    rows = max(LEAST_ROWS, CACHED_BYTES // max(matrix[:1].nbytes, 1))
    back = block.new_zeros(block.shape[1], block.shape[0])
    for some, made in zip(matrix.split(rows), image.split(rows), strict=True):
        torch.mm(some, block, out=made)
        back.addmm_(made.mT, some)
    return back.mT


def check(matrix: Tensor | Operator, rank: int, *, narrow: bool = False) -> None:
    """Refuse a matrix or a rank that no decomposition accepts.

    Args:
        narrow: whether bfloat16 and float16 are supported too.

    Raises:
        ValueError: not a float32 or float64 matrix (or stack), or a rank outside 1 to min(m, n).
    """
    if len(matrix.shape) < 2:
        raise ValueError(
            f"matrix has shape {tuple(matrix.shape)}: it must be (m, n), or a stack (…, m, n)."
        )
    supported = (torch.float32, torch.float64, *(SIXTEEN_BITS if narrow else ()))
    if matrix.dtype not in supported:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in supported)
        raise ValueError(
            f"matrix with dtype={matrix.dtype} is not supported: must be one of {names}. "
            "Call .float()."
        )
    m, n = matrix.shape[-2:]
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(m, n):
        raise ValueError(
            f"rank={rank!r} is not supported for a {m} x {n} matrix: must be an integer from 1 to "
            f"{min(m, n)}."
        )
