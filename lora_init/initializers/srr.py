"""SRR: keep the main output directions of W in the adapter, and quantize and correct the rest.

R = XᵀX / tokens is the uncentered second moment of the layer's inputs. The rank r is divided into k
preserved components and r - k components that correct the quantization error:

    U_k = the k leading eigenvectors of W R Wᵀ,
    Q = quant(W - U_k U_kᵀ W),    E = W - U_k U_kᵀ W - Q,
    V = the r - k leading eigenvectors of E R Eᵀ,
    B = [U_k, V],    A = [U_kᵀ W; Vᵀ E] / s.

The base becomes Q. With k = 0 this is `qera`. With S = R^(1/2) and ρ_p(M), the share of squared
singular values of M beyond the p-th, k minimizes ρ_k(W S) ρ_{r-k}(N S). N is a random matrix with
entries in [-1, 1] that stands for the unknown error.

For the same Q, the adapter with the least output error is that of `qera` on W - Q. `refit=True`
takes it after Q is chosen: U = the r leading eigenvectors of (W - Q) R (W - Q)ᵀ, B = U,
A = Uᵀ (W - Q) / s. The error is never larger. The report shows both.

Saving and loading: the base is quant(W - s B' A') with B' = [U_k, 0], A' = [U_kᵀ W; 0] / s (see
`lora_init.factors.Replacement`).

Source: "Preserve-Then-Quantize: Balancing Rank Budgets for Quantization Error Reconstruction in
LLMs" (Structured Residual Reconstruction), ICML 2026, arXiv 2602.02001. `refit` is an option of
this project.
Deviations: there is no official code. R's diagonal is raised by 1e-6 of its mean, as in `qera`. N
is drawn once per layer; other draws change k by about one. The paper also has a form with a
diagonal R, and smaller gradients for the preserved components in training; neither is supported.
PEFT does not have this method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_init import linalg
from lora_init.factors import Factors, Replacement
from lora_init.initializers.loftq import block_quantizer, layer_quantizer
from lora_init.initializers.qera import lifted, output_error
from lora_init.layer import Layer
from lora_init.linalg.draws import uniform
from lora_init.linalg.transfer import named_on_host
from lora_init.quantization import Quantizer
from lora_init.registry import Options, register_initializer, workspace


@dataclass
class SrrOptions(Options):
    """Settings of SRR; those of the quantizer are QERA's.

    A base that is quantized already keeps its own quantizer. `bits`, `quantizer` and `block_size`
    then have no effect.

    Attributes:
        preserved: k, the number of preserved components; None chooses it for each layer.
        refit: compute all r components of the adapter from W - Q.
        bits: bits per weight: 2, 4 or 8.
        quantizer: "normal_float" (NF2, NF4, and row-wise int8 at 8 bits) or "uniform".
        block_size: how many weights share one scale.
    """

    preserved: int | None = None
    refit: bool = False
    bits: int = 4
    quantizer: str = "normal_float"
    block_size: int = 64

    def __post_init__(self) -> None:
        whole = isinstance(self.preserved, int) and not isinstance(self.preserved, bool)
        if self.preserved is not None and not (whole and self.preserved >= 0):
            raise ValueError(
                f"srr: preserved={self.preserved!r} is not supported: must be None or an integer "
                ">= 0"
            )
        if not isinstance(self.refit, bool):
            raise ValueError(f"srr: refit={self.refit!r} is not supported: must be True or False")
        self.quantization()  # raises for unsupported values

    def quantization(self) -> Quantizer:
        return block_quantizer("srr", "bits", self.bits, self.quantizer, self.block_size)

    def refuse_rank(self, rank: int, shape: tuple[int, int]) -> str | None:
        if self.preserved is None or self.preserved <= rank:
            return None
        return f"preserved={self.preserved} components need a rank of at least as many"


@register_initializer(
    "srr",
    options=SrrOptions,
    paper="ICML 2026, arXiv 2602.02001",
    base="replace",
    preserves_output=False,
    reads=("weight", "inputs", "quantizer"),
    operations=("product", "convolution"),
)
@workspace(8.5, 2.5)
def srr(layer: Layer, options: SrrOptions) -> Factors:
    """A (rank, in), B (out, rank), float32, and the recipe of Q."""
    weight, (rows, columns), rank = layer.weight, layer.shape, layer.rank
    moment = lifted(layer.inputs.second_moment)
    outputs = leading(weight, moment, rank, layer)
    kept = options.preserved
    if kept is None:
        draws = 2 * uniform(rows, columns, generator=layer.generator).to(weight.device) - 1
        noise = leading(draws, moment, rank, layer)
        kept = preserved_rank(
            beyond(outputs, mean_square(weight, moment)), beyond(noise, mean_square(draws, moment))
        )
    lora_A, lora_B = weight.new_zeros(rank, columns), weight.new_zeros(rows, rank)
    basis = outputs.left[:, :kept]
    lora_A[:kept], lora_B[:, :kept] = basis.mT @ weight / layer.scaling, basis
    replacement = Replacement(layer_quantizer(layer, options), lora_A, lora_B)
    lost = weight - replacement.base(weight, layer.scaling)
    lora_A, lora_B = lora_A.clone(), lora_B.clone()
    if kept < rank:
        error = lost - basis @ (basis.mT @ weight)
        left = leading(error, moment, rank - kept, layer).left
        lora_A[kept:], lora_B[:, kept:] = left.mT @ error / layer.scaling, left
    remaining = lost - layer.scaling * lora_B @ lora_A
    total = mean_square(weight, moment).clamp_min(torch.finfo(torch.float64).tiny)
    figures = {"output_error": (mean_square(remaining, moment) / total).sqrt()}
    if options.refit:
        lora_B = leading(lost, moment, rank, layer).left
        lora_A = lora_B.mT @ lost / layer.scaling
        remaining = lost - layer.scaling * lora_B @ lora_A
        figures["output_error_before_refit"] = figures["output_error"]
        figures["output_error"] = (mean_square(remaining, moment) / total).sqrt()
    norm = linalg.frobenius_norm(weight).clamp_min(torch.finfo(weight.dtype).tiny)
    plain = weight - replacement.quantizer.roundtrip(weight)
    figures["error"] = linalg.frobenius_norm(remaining) / norm
    figures["error_without_adapter"] = linalg.frobenius_norm(plain) / norm
    named = {"quantizer": replacement.quantizer.name, "preserved_components": kept}
    return Factors(lora_A, lora_B, replacement, metrics=named_on_host(**figures) | named)


def leading(
    matrix: Float[Tensor, "out in"], moment: Float[Tensor, "in in"], rank: int, layer: Layer
) -> linalg.Decomposition:
    """The leading eigenpairs of M R Mᵀ."""
    operator = output_error(matrix, moment.to(matrix.dtype), moment)
    return linalg.top_singular(operator, rank, generator=layer.generator)


def mean_square(
    matrix: Float[Tensor, "out in"], moment: Float[Tensor, "in in"]
) -> Float[Tensor, ""]:
    """tr(M R Mᵀ), the mean of ‖M x‖²; float64."""
    return ((matrix @ moment.to(matrix.dtype)) * matrix).sum(dtype=torch.float64).clamp_min(0)


def beyond(found: linalg.Decomposition, total: Float[Tensor, ""]) -> Float[Tensor, " ranks"]:
    """ρ_0 … ρ_r: the share of the eigenvalues beyond the first p, for p = 0 … r."""
    values = torch.cat([found.values.new_zeros(1), found.values]).double().cumsum(0)
    return (1 - values / total.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0)


def preserved_rank(weight: Float[Tensor, " ranks"], noise: Float[Tensor, " ranks"]) -> int:
    """k with the smallest ρ_k(W S) ρ_{r-k}(N S); the smallest such k."""
    return int((weight * noise.flip(0)).argmin())
