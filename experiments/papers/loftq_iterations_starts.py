"""The starts that are compared: the library's methods, and the two ways to end an alternation.

| method | base | adapter |
|---|---|---|
| quantized only | Q = quant(W) | 0 |
| loftq | T times quantize, SVD | the last SVD |
| svd first | QPiSSA's alternation: T times SVD, quantize | one more SVD, of W - Q |
| qpissa | the same base | the SVD before the last quantization |
| qera | Q = quant(W) | the closed form for this Q, from the inputs' second moment |
| qera, diagonal | Q = quant(W) | the same with a diagonal second moment: the paper's QERA-approx |
| loftq + qera | LoftQ's base at the last T | the closed form for that Q |

`svd first` and `loftq` quantize equally often and both end on an SVD, so that between them nothing
but the order differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import Calibration, LoraConfig, LoraModel, init_factors, linalg
from lora_init.initializers.corda import NULL_SPACE_LIFT
from lora_init.initializers.qera import output_error
from lora_init.layer import LayerStatistics, layer_generator
from lora_init.linalg.moments import InputStatistics

from .loftq_iterations_errors import base_error
from .starts import adapted
from .subject import Layer, Subject

PLAIN, LOFTQ, SVD_FIRST, QPISSA = "quantized only", "loftq", "svd first", "qpissa"
QERA, DIAGONAL, LOFTQ_QERA = "qera", "qera, diagonal", "loftq + qera"
METHODS = (PLAIN, LOFTQ, SVD_FIRST, QPISSA, QERA, DIAGONAL, LOFTQ_QERA)

Factors = tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]


@dataclass(frozen=True)
class Start:
    """A model at step 0. It is the next one's after the next step of the iterator.

    Attributes:
        iterations: T; 0 where nothing is iterated.
    """

    method: str
    iterations: int
    model: LoraModel


@dataclass(frozen=True)
class Ground:
    """What every start of one model is made from.

    Attributes:
        targets: the layers that are quantized and adapted.
        weights: their original weights, by name.
        calibration: of their inputs.
    """

    subject: Subject
    targets: list[Layer]
    weights: dict[str, Tensor]
    calibration: Calibration
    seed: int

    def config(self, rank: int, initializer: dict, task_type: str | None = None) -> LoraConfig:
        """s = 1: no error depends on it."""
        return LoraConfig(
            r=rank, lora_alpha=rank, target_modules=[layer.name for layer in self.targets],
            init_lora_weights=initializer, task_type=task_type,
        )  # fmt: skip

    @contextmanager
    def started(
        self,
        rank: int,
        initializer: dict,
        calibration: Calibration | None = None,
        task_type: str | None = None,
    ) -> Iterator[LoraModel]:
        """The model with the adapter of `initializer`, and its own weights again afterwards.

        Args:
            calibration: of the inputs, in place of this ground's own.
            task_type: whose head is trained beside the adapter; None: no head is.
        """
        config = self.config(rank, initializer, task_type)
        with adapted(
            self.subject.model,
            config,
            f"rank {rank}",
            calibration or self.calibration,
            seed=self.seed,
            keep_original=True,
        ) as model:
            yield model

    def refit(self, model: LoraModel, fit: Callable[[str, Tensor, int, float], Factors]) -> None:
        """Give every layer the factors that `fit` finds for what its base has lost.

        Args:
            fit: (name, W - Q, rank, scaling) -> (A, B).
        """
        for name, layer in model.layers.items():
            lost = base_error(layer, self.weights[name])
            lora_A, lora_B = fit(name, lost, layer.rank, layer.scaling)
            layer.lora_A.data.copy_(lora_A)
            layer.lora_B.data.copy_(lora_B)

    def best_for_weight(self, name: str, lost: Tensor, rank: int, scaling: float) -> Factors:
        """SVD_r(W - Q), which is PiSSA's map."""
        made = init_factors(lost, "pissa", r=rank, lora_alpha=scaling * rank)
        return made.lora_A, made.lora_B

    def best_for_outputs(self, name: str, lost: Tensor, rank: int, scaling: float) -> Factors:
        """QERA's closed form for any Q: B = U, A = Uᵀ (W - Q) / s."""
        moment = self.calibration.layers[name].inputs.second_moment
        moment.diagonal().add_(NULL_SPACE_LIFT * moment.diagonal().mean())
        triplets = linalg.top_singular(
            output_error(lost, moment.float(), moment),
            rank,
            generator=layer_generator(self.seed, name),
        )
        return triplets.left.T @ lost / scaling, triplets.left


def starts(
    ground: Ground,
    bits: int,
    rank: int,
    iterations: Sequence[int],
    order_iterations: Sequence[int] = (),
    *,
    closed_form_last: bool = True,
) -> Iterator[Start]:
    """Every start at one number of bits and one rank.

    Args:
        iterations: T of LoftQ.
        order_iterations: T of the alternation that begins with an SVD.
        closed_form_last: and LoftQ's base with QERA's closed form, at the largest T.
    """
    with ground.started(rank, {"name": "qera", "bits": bits}) as model:
        yield Start(QERA, 0, model)
        for layer in model.layers.values():
            layer.lora_B.data.zero_()
        yield Start(PLAIN, 0, model)
    with ground.started(
        rank, {"name": "qera", "bits": bits}, diagonal(ground.calibration)
    ) as model:
        yield Start(DIAGONAL, 0, model)
    for count in sorted(iterations):
        chosen = {"name": "loftq", "loftq_bits": bits, "loftq_iter": count}
        with ground.started(rank, chosen) as model:
            yield Start(LOFTQ, count, model)
            if closed_form_last and count == max(iterations):
                ground.refit(model, ground.best_for_outputs)
                yield Start(LOFTQ_QERA, count, model)
    for count in sorted(order_iterations):
        chosen = {"name": "qpissa", "bits": bits, "iterations": count}
        with ground.started(rank, chosen) as model:
            yield Start(QPISSA, count, model)
            ground.refit(model, ground.best_for_weight)
            yield Start(SVD_FIRST, count, model)


def diagonal(calibration: Calibration) -> Calibration:
    """The same inputs taken for uncorrelated: diagonal second moments, no means."""
    made: dict[int, LayerStatistics] = {}
    for statistics in calibration.layers.values():
        inputs = statistics.inputs
        if id(inputs) not in made:
            squares = inputs.second_moment.diagonal()
            made[id(inputs)] = LayerStatistics(
                InputStatistics(
                    torch.diag(squares).float(), torch.zeros_like(inputs.mean), inputs.tokens
                )
            )
    (request,) = calibration.requests
    layers = {name: made[id(found.inputs)] for name, found in calibration.layers.items()}
    return Calibration(
        {request: layers}, calibration.tokens, calibration.batches, calibration.fingerprints
    )
