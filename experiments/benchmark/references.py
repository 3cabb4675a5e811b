"""Float64 truths that quality is measured against, each computed once for all strategies.

The singular vectors of a synthetic weight are known from how it was made. Those of other weights
come from a float64 SVD. It is taken of up to four layers of each shape, spread over the model, or
of one layer where decompositions are expensive. The same holds for products W R and second moments.
What the device cannot decompose in seconds has no reference, and its figures stay empty. Where only
the first triplets are needed, `leading.py` finds them as exactly, at a tenth of the cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.benchmark.leading import leading, leading_left
from experiments.benchmark.strategies import LOFTQ_ITERATIONS
from experiments.benchmark.subjects import Subject
from lora_init.moments import InputStatistics
from lora_init.plan.plan import Target
from lora_init.quantization import Quantizer
from lora_init.weights.kinds import oriented_weight

PER_SHAPE = 4
DEAR = 2**32  # m n min(m, n) from which one layer of a shape has to do
TOO_DEAR = {"cpu": 2**34, "cuda": 2**37}
"""Beyond so many a device is not asked for an SVD. CUDA does twice 4096³, and not 11008 · 4096²:
that takes minutes in float64."""
PARTIAL = 10  # so many times less than an SVD the first triplets take
# CorDA lifts R by this share of its mean diagonal, which keeps W R's last triplets unique where
# R is singular in float32. Stated in lora_init/initializers/corda.py; a test compares the two.
CORDA_LIFT = 1e-6


@dataclass(frozen=True)
class Ends:
    """The first and the last left singular vectors, float64 columns; None where not known."""

    first: Float[Tensor, "m k"]
    last: Float[Tensor, "m k"] | None


class References:
    """The truths about one subject, for ranks up to `rank`."""

    def __init__(
        self,
        subject: Subject,
        targets: Sequence[Target],
        rank: int,
    ) -> None:
        self.subject = subject
        self.rank = rank
        self.judged = spread(targets)
        self._weights: dict[str, Ends | None] = {}
        self._alternated: dict[tuple[str, int], float] = {}
        self.inputs: Mapping[str, InputStatistics] = {}
        self._forget()

    def read(self, inputs: Mapping[str, InputStatistics]) -> None:
        """The layers' inputs, by which products and directions are judged from here on.

        What is known of the same inputs stays known: for another rank, or another strategy.
        """
        if inputs and any(inputs[name] is not self.inputs.get(name) for name in inputs):
            self._forget()
            self.inputs = inputs

    def _forget(self) -> None:
        self._product: tuple[str, Tensor] | None = None
        self._products: dict[tuple[str, bool], Ends | None] = {}
        self._directions: dict[int, Tensor] = {}

    def weight(self, name: str) -> Float[Tensor, "m n"]:
        """The original weight in float64."""
        return oriented_weight(self.subject.model.get_submodule(name)).detach().double()

    def second_moment(self, name: str, lifted: bool) -> Float[Tensor, "n n"]:
        moment = self.inputs[name].second_moment.double()
        if lifted:
            moment.diagonal().add_(CORDA_LIFT * moment.diagonal().mean())
        return moment

    def product(self, name: str) -> Float[Tensor, "m n"]:
        """W R. The last one is kept: its triplets and what lies beyond them are asked for."""
        if self._product is None or self._product[0] != name:
            self._product = name, self.weight(name) @ self.second_moment(name, lifted=False)
        return self._product[1]

    def of_weight(self, name: str) -> Ends | None:
        if name not in self._weights:
            self._weights[name] = self._known(name) or self._decomposed(self.weight(name))
        return self._weights[name]

    def of_product(self, name: str, lifted: bool) -> Ends | None:
        """Of W R, or of W (R + lift)."""
        key = name, lifted
        if key not in self._products:
            rows, columns = self.subject.model.get_submodule(name).weight.shape
            operations = rows * columns * min(rows, columns)
            if self._too_dear(operations if lifted else operations // PARTIAL):
                return None
            # CorDA's smallest triplets are those of the lifted product, its largest of the other.
            if lifted:
                product = self.weight(name) @ self.second_moment(name, lifted)
                self._products[key] = self._decomposed(product)
            else:
                self._products[key] = Ends(leading_left(self.product(name), self.rank), None)
        return self._products[key]

    def directions(self, name: str) -> Float[Tensor, "n k"] | None:
        """Eigenvectors of the covariance of the layer's inputs, ascending."""
        inputs = self.inputs[name]
        if id(inputs) not in self._directions:
            if self._too_dear(len(inputs.covariance) ** 3 // PARTIAL):
                return None
            # Twice the rank: what EVA may give to a layer.
            found = leading(inputs.covariance.double(), 2 * self.rank)[1]
            self._directions[id(inputs)] = found.flip(1)
        return self._directions[id(inputs)]

    def alternated(self, name: str, rank: int) -> float | None:
        """‖W - Q - B A‖ after LoftQ's alternations, the best of rank r found to 1e-8 each time.

        Five times the first triplets of a matrix whose values lie close together: as dear as twice
        an SVD.
        """
        if (name, rank) not in self._alternated:
            weight = self.weight(name)
            if self._too_dear(2 * weight.numel() * min(weight.shape)):
                return None
            quantizer, product = Quantizer(), torch.zeros_like(weight)
            for _ in range(LOFTQ_ITERATIONS):
                residual = weight - quantizer.roundtrip((weight - product).float()).double()
                left = leading_left(residual, rank, tolerance=1e-8)
                product = left @ (left.T @ residual)
            self._alternated[name, rank] = float((residual - product).norm())
        return self._alternated[name, rank]

    @cached_property
    def _rounded(self) -> bool:
        """Whether the weights were rounded further than their smallest triplets bear."""
        return next(self.subject.model.parameters()).dtype != torch.float32

    def _known(self, name: str) -> Ends | None:
        made = self.subject.known.get(name)
        if made is None:
            return None
        count, device = min(made.rows, made.columns), self.subject.device
        last = None if self._rounded else made.left(count - self.rank, count, device).double()
        return Ends(made.left(0, self.rank, device).double(), last)

    def _decomposed(self, matrix: Tensor) -> Ends | None:
        if self._too_dear(matrix.numel() * min(matrix.shape)):
            return None
        left = torch.linalg.svd(matrix, full_matrices=False)[0]
        return Ends(left[:, : self.rank].clone(), left[:, -self.rank :].clone())

    def _too_dear(self, operations: int) -> bool:
        return operations > TOO_DEAR[self.subject.device.type]


def spread(targets: Sequence[Target]) -> list[str]:
    """Names of up to four targets of each shape, the first and the last among them."""
    by_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
    for target in targets:
        by_shape[target.shape].append(target.name)
    chosen = []
    for (rows, columns), names in by_shape.items():
        count = 1 if rows * columns * min(rows, columns) > DEAR else min(PER_SHAPE, len(names))
        places = [round(i * (len(names) - 1) / max(count - 1, 1)) for i in range(count)]
        chosen += [names[place] for place in places]
    return chosen
