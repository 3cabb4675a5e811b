"""Linear maps known by their products, for matrices that are dearer to form than to apply.

What a decomposition costs is the reading of W. A step of W^T W needs two products, W X and
W^T (W X): taken a few rows of W at a time, while these are in the cache, both are made from one
reading of it (`round_trip`).
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

CACHED_BYTES = 2**19
LEAST_ROWS = 64
"""Rows of a matrix that are taken at a time: what a core keeps near, but no fewer than these."""
SHARED_NUMBERS = 2**22
"""From so many numbers on a matrix is worth the threads that its rows are shared among."""


@dataclass(frozen=True)
class Operator:
    """A linear map, or a stack of maps of one shape, known by its products only.

    Attributes:
        shape: (*stack, m, n).
        matmul: (*stack, n, k) -> (*stack, m, k).
        rmatmul: (*stack, m, k) -> (*stack, n, k), the product with the transpose.
        dtype: of the blocks both take and return, float32 or float64.
        device: where the blocks live.
        upcast: makes the same map in float64, for spectra that float32 cannot resolve; without it
            such a map is formed as a matrix.
        factors: the two matrices of a product, which `bottom_singular` inverts one by one.
        matrix: of a dense map; it may have 16 bits where `dtype` is float32.
        members: of a stack: the maps one by one.
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
    def product(cls, first: Float[Tensor, "*stack m j"], second: Float[Tensor, "*stack j n"]):
        """``x -> first (second x)``, without forming the product.

        Forming it costs as much as n single products; a partial decomposition needs a few hundred.

        Raises:
            ValueError: the inner dimensions or the dtypes differ.
        """
        if min(first.ndim, second.ndim) < 2 or first.shape[-1] != second.shape[-2]:
            raise ValueError(
                f"Operator.product got shapes {tuple(first.shape)} and {tuple(second.shape)}; "
                "allowed are two matrices (m, j) and (j, n) with the same j, or stacks of them."
            )
        if first.dtype != second.dtype:
            raise ValueError(
                f"Operator.product got dtypes {first.dtype} and {second.dtype}; cast one of them."
            )
        stack = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])

        def members() -> list[Operator]:
            return [cls.product(*pair) for pair in zip(first, second, strict=True)]

        return cls(
            shape=(*stack, first.shape[-2], second.shape[-1]),
            matmul=lambda block: first @ (second @ block),
            rmatmul=lambda block: transposed_product(second, transposed_product(first, block)),
            dtype=first.dtype,
            device=first.device,
            upcast=lambda: cls.product(first.double(), second.double()),
            factors=(first, second),
            both=lambda block: through(first, second, block),
            members=members if first.ndim == second.ndim == 3 else None,
        )

    @classmethod
    def dense(cls, matrix: Float[Tensor, "*stack m n"]) -> Operator:
        """``x -> matrix x``; a matrix of 16 bits gives float32, if possible without a copy."""
        if mixed_products.has_mixed_products(matrix):
            return cls(
                shape=tuple(matrix.shape),
                matmul=lambda block: mixed_products.product(matrix, block),
                rmatmul=lambda block: mixed_products.transposed_product(matrix, block),
                dtype=torch.float32,
                device=matrix.device,
                upcast=lambda: cls.dense(matrix.double()),
                matrix=matrix,
            )
        if mixed_products.is_narrow(matrix.dtype):
            matrix = matrix.float()
        return cls(
            shape=tuple(matrix.shape),
            matmul=lambda block: matrix @ block,
            rmatmul=lambda block: transposed_product(matrix, block),
            dtype=matrix.dtype,
            device=matrix.device,
            upcast=lambda: cls.dense(matrix.double()),
            matrix=matrix,
            both=lambda block: round_trip(matrix, block),
        )

    @property
    def transpose(self) -> Operator:
        """``x -> matrix.T x``."""
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
        """``matrix block`` and ``matrix.T matrix block``."""
        if self.both is not None:
            return self.both(block)
        image = self.matmul(block)
        return image, self.rmatmul(image)

    def widened(self) -> Operator:
        """The same map in float64, where it knows how."""
        return self if self.upcast is None else self.upcast()

    def to_dense(self) -> Float[Tensor, "*stack m n"]:
        """The matrix itself; of a map without factors by products with its smaller identity."""
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
    """``matrix^T block``, in the order that reads a matrix stored by rows as it lies.

    5632 × 2048, 16 to 24 columns, float32: 5.5 to 6.4 ms against 5.9 to 7.6 (two cores); 2048 ×
    2048: 1.5 to 1.8 against 2.2 to 2.8.
    """
    return (block.mT @ matrix).mT


def round_trip(
    matrix: Float[Tensor, "*stack m n"], block: Float[Tensor, "*stack n k"]
) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack n k"]]:
    """``matrix block`` and ``matrix^T matrix block``, on a CPU from one reading of the matrix.

    One core (Intel Xeon, 2 MiB of second-level cache), float32, 16 columns, one after the other
    and together: 2048 × 2048 6.3 and 3.2 ms, 5632 × 2048 19 and 9.4, 2048 × 5632 16 and 9.7,
    4096 × 4096 27 and 14, 11008 × 4096 91 and 42; at 1536 × 576 it makes no difference.
    """
    rows = max(LEAST_ROWS, CACHED_BYTES // max(matrix[..., :1, :].nbytes, 1))
    plain = matrix.ndim == block.ndim == 2 and matrix.device.type == "cpu"
    if not plain or matrix.stride(-1) != 1 or matrix.nbytes < 4 * CACHED_BYTES:
        image = matrix @ block
        return image, transposed_product(matrix, image)
    image = block.new_empty(matrix.shape[0], block.shape[1])
    threads = torch.get_num_threads()
    if threads == 1 or matrix.numel() < SHARED_NUMBERS:
        return image, by_rows(matrix, block, image, rows)
    parts = zip(matrix.tensor_split(threads), image.tensor_split(threads), strict=True)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        sums = list(pool.map(lambda part: by_rows(part[0], block, part[1], rows), parts))
    torch.set_num_threads(threads)  # threads to come take the number that was set last
    return image, torch.stack(sums).sum(0)


@torch.no_grad()
def by_rows(
    matrix: Float[Tensor, "m n"],
    block: Float[Tensor, "n k"],
    image: Float[Tensor, "m k"],
    rows: int,
) -> Float[Tensor, "n k"]:
    """Fill `image` with ``matrix block``, some rows at a time, and return ``matrix^T image``."""
    back = block.new_zeros(block.shape[1], block.shape[0])
    for some, made in zip(matrix.split(rows), image.split(rows), strict=True):
        torch.mm(some, block, out=made)
        back.addmm_(made.mT, some)
    return back.mT


def through(
    first: Float[Tensor, "*stack m j"],
    second: Float[Tensor, "*stack j n"],
    block: Float[Tensor, "*stack n k"],
) -> tuple[Float[Tensor, "*stack m k"], Float[Tensor, "*stack n k"]]:
    """``M block`` and ``M^T M block`` of the product M = first second."""
    image, back = round_trip(first, second @ block)
    return image, transposed_product(second, back)


def check(matrix: Tensor | Operator, rank: int, *, narrow: bool = False) -> None:
    """Refuse what no decomposition takes.

    Args:
        narrow: whether bfloat16 and float16 are supported, too.

    Raises:
        ValueError: not a float32 or float64 matrix (or stack), or a rank outside 1 … min(m, n).
    """
    if len(matrix.shape) < 2:
        raise ValueError(
            f"matrix has shape {tuple(matrix.shape)}; allowed is (m, n), or a stack (…, m, n)."
        )
    supported = (torch.float32, torch.float64, *(SIXTEEN_BITS if narrow else ()))
    if matrix.dtype not in supported:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in supported)
        raise ValueError(
            f"matrix with dtype={matrix.dtype} is not supported: must be one of {names}. "
            "Call .float()."
        )
    m, n = matrix.shape[-2:]
    limit = min(m, n)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= limit:
        raise ValueError(
            f"rank={rank!r} is not allowed for a {m} x {n} matrix; "
            f"give an integer from 1 to {limit}."
        )
