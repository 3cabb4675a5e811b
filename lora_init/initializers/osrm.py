"""OSRM: initialize A with the directions that the inputs of other tasks use least, and B with zero.

The calibration data are those of the other tasks. R = XᵀX / tokens is the uncentered second moment
of their inputs. The rows of A are the eigenvectors of R's r smallest eigenvalues; B = 0. The base
stays. Inputs of the other tasks give almost zero A x. Adapters of different tasks then disturb each
other less when they are added to one model.

Training may turn A towards the other tasks' inputs. `osrm_frozen` does not train A.

Source: Zhang & Zhou, "Unraveling LoRA Interference: Orthogonal Subspaces for Robust Model Merging",
ACL 2025, arXiv 2505.22934. `osrm_frozen` is a variant of this project.
Deviations: this is the formula of the paper. The official code replaces each task by one mean
vector over tokens and padding, and takes the last right singular vectors of these few rows. That is
an arbitrary basis of their null space. Where the data leave more than r directions unused, A is any
r of them. The report shows `inputs_used`, the share of the inputs' mean square in the span of A.
The factors are not divided by the scaling. PEFT does not have this method.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from lora_init.factors import Factors
from lora_init.initializers.lora_null import used_share
from lora_init.layer import Layer
from lora_init.registry import CalibrationRequest, Options, batched, register_initializer, workspace


@dataclass
class OsrmOptions(Options):
    """Settings of OSRM: none."""

    def input_request(self) -> CalibrationRequest:
        return CalibrationRequest(smallest=True)


@dataclass
class OsrmFrozenOptions(OsrmOptions):
    """Settings of OSRM with a frozen A: none."""

    frozen = ("lora_A",)


register = partial(
    register_initializer,
    paper="Zhang & Zhou 2025, arXiv 2505.22934",
    reads=("inputs",),
    operations=("product", "convolution"),
)


@register("osrm_frozen", options=OsrmFrozenOptions)
@register("osrm", options=OsrmOptions)
@batched
@workspace(0.5, 4.5)
def osrm(layer: Layer, options: OsrmOptions) -> Factors:
    """A (rank, in) with orthonormal rows, B (out, rank) zero; float32."""
    unused = layer.inputs.least_directions(layer.rank)
    lora_A = unused.mT.float()
    return Factors(
        lora_A=lora_A,
        lora_B=lora_A.new_zeros(*layer.stack, layer.shape[0], layer.rank),
        metrics={"inputs_used": used_share(layer.inputs.second_moment, unused)},
    )
