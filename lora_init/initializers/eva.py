"""EVA: A holds the principal directions of the layer's inputs, B is zero.

R = XᵀX / tokens (centred: minus the mean's outer product); A = its top r eigenvectors, rows of
unit norm; B = 0. Ranks are redistributed over the layers: the explained-variance ratios of all
layers' first r·rho components are pooled and the largest sum(r) of them kept, so that a layer's
rank is the number of its components among them. A layer may get rank 0: it then has no adapter.
alpha is changed with the rank so that the scaling of every layer stays what it was.

Source: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024,
arXiv 2410.07170, algorithm 1.
Deviations: the theorem of the paper is about uncentred inputs; its algorithm and official code
centre them by incremental PCA. `center=True` follows the code. The covariance here is that of all
tokens seen, in one pass: exact and free of the batches' order; the official code and PEFT stream a
truncated PCA and stop a layer when its components' cosine between batches exceeds `tau`. An exact
pass has nothing to stop early, so `tau` is accepted at its default for the sake of PEFT's
configuration files and refused otherwise. PEFT's adjust_scaling_factors multiplies alpha by r'/r
under rsLoRA too, which changes the scaling; ours multiplies by sqrt(r'/r) there. The paper keeps
the sum of ranks, so that the number of parameters changes where layers differ in shape;
budget="parameters" keeps that number instead, by variance explained per parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init.allocation import LayerRequest, redistribute, redistribute_by_cost
from lora_init.factors import Factors
from lora_init.layer import Layer
from lora_init.linalg.cores import STACK_BYTES, over_cores
from lora_init.moments import InputStatistics, decompose_together, leading
from lora_init.registry import CalibrationRequest, Options, register_initializer
from lora_init.weights.module_types import LINEAR_TYPES

# Variances below this share of the largest are float32's rounding, not the data's: such directions
# were never seen (fewer tokens than r), are worth no rank, and whitening them would scale noise up.
UNSEEN = 1e-6
BUDGETS = ("ranks", "parameters")


@dataclass
class EvaOptions(Options):
    """Settings of EVA; names and defaults are those of PEFT's EvaConfig, `center` and `budget`.

    Attributes:
        rho: a layer's rank may grow to r·rho; 1.0 keeps all ranks uniform.
        tau: early stop of a streaming PCA; meaningless for an exact pass, so only 0.99 is accepted.
        use_label_mask: leave out token positions whose label is `label_mask_value`.
        label_mask_value: see above.
        whiten: divide each direction by the standard deviation of its component.
        adjust_scaling_factors: keep each layer's scaling when its rank changes.
        center: subtract the mean input before the decomposition.
        budget: what redistribution keeps: "ranks", their sum, as the paper; or "parameters", the
            sum of r (in + out), which it never exceeds.
    """

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
            raise ValueError(f"eva: rho={self.rho!r}; allowed are finite numbers >= 1.0")
        if self.tau != 0.99:
            raise ValueError(
                f"eva: tau={self.tau!r}; the calibration pass is exact and never stops early, so "
                "tau has no effect: leave it at 0.99"
            )
        if self.budget not in BUDGETS:
            raise ValueError(f"eva: budget={self.budget!r}; allowed are {', '.join(BUDGETS)}")

    def input_request(self) -> CalibrationRequest:
        return CalibrationRequest(self.label_mask_value if self.use_label_mask else None)

    def keeps_scaling(self) -> bool:
        return self.adjust_scaling_factors

    def directions(self, rank: int, shape: tuple[int, int]) -> int:
        """The rank up to which a layer of planned rank `rank` may grow."""
        return min(int(rank * self.rho), *shape)

    def allocate(self, requests: Mapping[str, LayerRequest]) -> dict[str, int]:
        """Pool explained-variance ratios over layers and keep the best that the budget holds."""
        limits = {
            name: self.directions(layer.rank, layer.shape) for name, layer in requests.items()
        }
        _decompose(requests, limits, self.center)
        spectra = _spectra(requests, limits, self.center)
        if self.budget == "parameters":
            costs = {name: sum(layer.shape) for name, layer in requests.items()}
            budget = sum(layer.rank * costs[name] for name, layer in requests.items())
            return redistribute_by_cost(spectra, costs, budget)
        return redistribute(spectra, budget=sum(layer.rank for layer in requests.values()))


def _distinct(
    requests: Mapping[str, LayerRequest], limits: Mapping[str, int]
) -> dict[tuple[int, int], str]:
    """By input and limit, one layer that asks for it."""
    distinct: dict[tuple[int, int], str] = {}
    for name, layer in requests.items():
        distinct.setdefault((id(layer.statistics.inputs), limits[name]), name)
    return distinct


def _decompose(
    requests: Mapping[str, LayerRequest], limits: Mapping[str, int], center: bool
) -> None:
    """Decompose every distinct input once. It keeps its components for all later calls.

    A CPU shares the inputs out over its cores. An accelerator takes those of one width as stacks.
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
    """Explained-variance ratios of every layer, on the CPU, by one copy from each device."""
    distinct = _distinct(requests, limits)
    by_device = defaultdict(dict)
    for key, name in distinct.items():
        inputs = requests[name].statistics.inputs
        values, _, total = inputs.principal_components(limits[name], center)
        values = torch.where(values > UNSEEN * values[0], values, 0.0)
        # A layer whose inputs never vary explains nothing and asks for no rank.
        by_device[inputs.device][key] = torch.where(total > 0, values / total, 0.0)
    spectra = {}
    for found in by_device.values():
        together = torch.cat(list(found.values())).cpu()
        lengths = [len(values) for values in found.values()]
        spectra |= dict(zip(found, together.split(lengths), strict=True))
    return {
        name: spectra[id(layer.statistics.inputs), limits[name]] for name, layer in requests.items()
    }


@register_initializer(
    "eva",
    options=EvaOptions,
    paper="Paischer et al. 2024, arXiv 2410.07170",
    reads=("inputs",),
    modules=(*LINEAR_TYPES, "Conv2d"),
)
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
