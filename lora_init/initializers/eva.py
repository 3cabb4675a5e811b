"""EVA: initialize A with the principal directions of the layer's inputs, and B with zero.

R = XᵀX / tokens, centered: minus the outer product of the mean. A = the top r eigenvectors of R, as
rows of unit norm; B = 0. `eva_frozen` does not train A. With rho=1 it is also known as IPA.

Ranks are redistributed over the layers. The explained-variance ratios of the first r·rho components
of all layers are pooled, and the largest sum(r) of them are kept. A layer's rank is the number of
its components among those; a layer with rank 0 has no adapter. alpha changes with the rank, so that
the scaling of every layer stays the same.

Source: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024,
arXiv 2410.07170, algorithm 1. `eva_frozen`: Yin et al., "IPA: An Information-Reconstructive Input
Projection Framework for Efficient Foundation Model Adaptation", TMLR, arXiv 2509.04398.
Deviations: the paper's theorem is about uncentered inputs, but its algorithm and official code
center them by incremental PCA. `center=True` follows the code.
The covariance here is that of all tokens, collected in one exact pass that does not depend on the
order of the batches. The official code and PEFT stream a truncated PCA and stop a layer when the
cosine of its components between batches exceeds `tau`. An exact pass never stops early. So `tau`
must keep its default; it exists only because PEFT's configuration files contain it.
PEFT's adjust_scaling_factors multiplies alpha by r'/r under rsLoRA too, which changes the scaling.
This code multiplies by sqrt(r'/r) there.
The paper keeps the sum of ranks, so the number of parameters changes where layers differ in shape.
IPA estimates the components by incremental PCA, without a mask of padding, at equal ranks (rho=1).
Its scaling is 0.25, alpha = r/4 here. Its learned projections (gha, moving average) are not
supported.
budget="parameters" keeps that number instead and ranks components by variance explained per
parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.factors import Factors
from lora_init.layer import Layer, LayerRequest
from lora_init.linalg.cores import STACK_BYTES, over_cores
from lora_init.linalg.moments import InputStatistics, decompose_together, leading
from lora_init.registry import CalibrationRequest, Options, register_initializer, workspace

# Variances below this share of the largest are float32 rounding: the data never used such
# directions (fewer tokens than r). They get no rank, and whitening them would amplify noise.
UNSEEN = 1e-6
BUDGETS = ("ranks", "parameters")


@dataclass
class EvaOptions(Options):
    """Settings of EVA: those of PEFT's EvaConfig, and `center` and `budget`.

    Attributes:
        rho: a layer's rank may grow to r·rho; 1.0 keeps all ranks uniform.
        tau: threshold of a streaming PCA; must be 0.99, because the pass here is exact.
        use_label_mask: leave out token positions whose label is `label_mask_value`.
        label_mask_value: the label of the positions that `use_label_mask` leaves out.
        whiten: divide each direction by the standard deviation of its component.
        adjust_scaling_factors: keep each layer's scaling when its rank changes.
        center: subtract the mean input before the decomposition.
        budget: what the redistribution keeps: "ranks", the sum of ranks as in the paper, or
            "parameters", the sum of r (in + out), as an upper limit.
    """

    method: ClassVar[str] = "eva"

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True
    center: bool = True
    budget: str = "ranks"

    def __post_init__(self) -> None:
        if not isinstance(self.rho, int | float) or not 1.0 <= self.rho < float("inf"):
            raise ValueError(
                f"{self.method}: rho={self.rho!r} is not supported: must be a finite number >= 1.0"
            )
        if self.tau != 0.99:
            raise ValueError(
                f"{self.method}: tau={self.tau!r} is not supported: must be 0.99. The "
                "calibration pass is exact and never stops early, so leave tau out"
            )
        if self.budget not in BUDGETS:
            raise ValueError(
                f"{self.method}: budget={self.budget!r} is not supported: must be one of "
                f"{', '.join(BUDGETS)}"
            )

    def input_request(self) -> CalibrationRequest:
        return CalibrationRequest(self.label_mask_value if self.use_label_mask else None)

    def keeps_scaling(self) -> bool:
        return self.adjust_scaling_factors

    def directions(self, rank: int, shape: tuple[int, int]) -> int:
        """The rank up to which a layer of planned rank `rank` may grow."""
        return min(int(rank * self.rho), *shape)

    def allocate(self, requests: Mapping[str, LayerRequest]) -> dict[str, int]:
        """Pool the explained-variance ratios of all layers and keep the largest within budget."""
        limits = {
            name: self.directions(layer.rank, layer.shape) for name, layer in requests.items()
        }
        _decompose(requests, limits, self.center)
        spectra = _spectra(requests, limits, self.center)
        costs = {
            name: sum(layer.shape) if self.budget == "parameters" else 1
            for name, layer in requests.items()
        }
        budget = sum(layer.rank * costs[name] for name, layer in requests.items())
        return _redistribute(spectra, costs, budget)


@dataclass
class EvaFrozenOptions(EvaOptions):
    """Settings of EVA with a frozen A, those of EVA; rho=1 is IPA."""

    method: ClassVar[str] = "eva_frozen"
    frozen = ("lora_A",)


def _distinct(
    requests: Mapping[str, LayerRequest], limits: Mapping[str, int]
) -> dict[tuple[int, int], str]:
    """One layer's name for each distinct pair of input and limit."""
    distinct: dict[tuple[int, int], str] = {}
    for name, layer in requests.items():
        distinct.setdefault((id(layer.statistics.inputs), limits[name]), name)
    return distinct


def _decompose(
    requests: Mapping[str, LayerRequest], limits: Mapping[str, int], center: bool
) -> None:
    """Decompose every distinct input once; the statistics cache the components.

    CPU cores work on different inputs in parallel. An accelerator takes inputs of one width as
    stacks.
    """
    on_cpu, stacks = [], defaultdict(list)
    for name in _distinct(requests, limits).values():
        inputs = requests[name].statistics.inputs
        if inputs.device.type == "cpu" or not isinstance(inputs, InputStatistics):
            on_cpu.append(name)
        else:
            stacks[requests[name].shape[1], limits[name], inputs.device].append(inputs)

    def decompose(name: str) -> None:
        requests[name].statistics.inputs.principal_components(limits[name], center)

    for _ in over_cores(decompose, on_cpu, lambda name: requests[name].shape[1] ** 2):
        pass
    for (_, limit, _), inputs in stacks.items():
        decompose_together(inputs, limit, center, memory=STACK_BYTES)


def _spectra(
    requests: Mapping[str, LayerRequest], limits: Mapping[str, int], center: bool
) -> dict[str, Float[Tensor, " candidates"]]:
    """Explained-variance ratios of every layer, copied to the CPU once per device."""
    distinct = _distinct(requests, limits)
    by_device = defaultdict(dict)
    for key, name in distinct.items():
        inputs = requests[name].statistics.inputs
        values, _, total = inputs.principal_components(limits[name], center)
        values = torch.where(values > UNSEEN * values[0], values, 0.0)
        # A layer whose inputs never vary gets rank 0.
        by_device[inputs.device][key] = torch.where(total > 0, values / total, 0.0)
    spectra = {}
    for found in by_device.values():
        together = torch.cat(list(found.values())).cpu()
        lengths = [len(values) for values in found.values()]
        spectra |= dict(zip(found, together.split(lengths), strict=True))
    return {
        name: spectra[id(layer.statistics.inputs), limits[name]] for name, layer in requests.items()
    }


def _redistribute(
    spectra: Mapping[str, Float[Tensor, " candidates"]], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Choose ranks by score per cost, with a limit on the sum of costs.

    The algorithm is greedy: it takes the best ratio that still fits. The scores of a layer descend
    and its ranks have equal cost, so a layer always gets its first directions. The unused budget is
    less than the cost of one more rank in any layer that could still grow.

    Args:
        spectra: per layer, scores in descending order that are comparable between layers. The
            length of a layer's spectrum limits its rank. Zeros are never chosen.
        costs: the cost of one rank of each layer: 1, or its parameters.
        budget: the maximum of the sum of costs.

    Returns:
        One rank per layer, in the order of `spectra`, possibly 0. Ties go to the earlier layer.
    """
    pool = [
        (score / costs[name], name)
        for name, scores in spectra.items()
        for score in scores.tolist()
        if score > 0
    ]
    pool.sort(key=lambda entry: entry[0], reverse=True)  # stable: ties stay in order
    ranks = dict.fromkeys(spectra, 0)
    for _, name in pool:
        if costs[name] <= budget:
            budget -= costs[name]
            ranks[name] += 1
    return ranks


@register_initializer(
    "eva_frozen",
    options=EvaFrozenOptions,
    paper="Yin et al. 2025, arXiv 2509.04398",
    reads=("inputs",),
    operations=("product", "convolution"),
)
@register_initializer(
    "eva",
    options=EvaOptions,
    paper="Paischer et al. 2024, arXiv 2410.07170",
    reads=("inputs",),
    operations=("product", "convolution"),
)
@workspace(1.0, 5.0)
def eva(layer: Layer, options: EvaOptions) -> Factors:
    """A (rank, in) with orthonormal rows unless whitened, B (out, rank) zero; float32."""
    size = layer.rank
    if layer.planned_rank is not None:  # `allocate` has decomposed the inputs at this size
        size = options.directions(layer.planned_rank, layer.shape)
    components = layer.inputs.principal_components(size, options.center)
    values, vectors, total = leading(components, layer.rank)
    lora_A = vectors.T
    if options.whiten:
        seen = values > UNSEEN * values[0]
        lora_A = lora_A / torch.where(seen, values, 1.0).sqrt()[:, None]
    explained = torch.where(total > 0, values.sum() / total, 0.0)
    lora_B = torch.zeros(layer.shape[0], layer.rank, dtype=torch.float32, device=lora_A.device)
    return Factors(lora_A.contiguous(), lora_B, metrics={"explained_variance": explained})
