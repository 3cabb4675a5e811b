"""Sharpness: the largest curvature of the loss where each method starts, beside its best rate.

Gradient descent on a quadratic of curvature λ diverges above the rate 2 / λ, so of two starts that
compute the same function, the sharper one stands the smaller rate. The paper measures the largest
eigenvalue of the Hessian with respect to the adapter's parameters and finds it to explain why
tuned rates differ: it is largest for OLoRA and LoRA-GA, then PiSSA's, then MiLoRA's and Init[AB]'s.

With B = 0 the loss is no quadratic bowl: ∂²L/∂A² = 0, and the Hessian is (0, C; Cᵀ, H_BB), a saddle
whose cross term C carries the gradient of the product, so λmin is reported as well.

Adam does not step along the gradient. Its first step is η in the direction of the gradient's signs
d, in which a quadratic model's loss falls by η ‖g‖₁ - η² dᵀ H d / 2: most, on average over batches,
at η = E‖g‖₁ / E[dᵀ H d], "Adam's first step" in the tables. (The Hessian preconditioned by Adam's
second moment, which its edge of stability is about, is not defined at the start: where B = 0, the
second moment of every entry of A is zero.)

    lanczos        the extreme eigenvalues of a symmetric operator
    curvature      the gradient and Hessian products of a loss on one batch
    starts         every method's start on one model, batches, heads
    best_rates     what sweeps found, from the settings or a protocol's record
    measurement    settings, measurement, the reproduction
    claims         ratios, correlation, verdicts
    charts         tables and figures

Source: Lee, Ko, Chen & Yeh 2026, "Learning Rate Matters: Vanilla LoRA May Suffice for LLM
Fine-tuning", arXiv 2602.04998, the analysis of the Hessian.
"""

from __future__ import annotations

from experiments.papers.reproduction import Paper
from experiments.papers.sharpness.measurement import SharpnessSettings, reproduce

PAPER = Paper(
    name="sharpness",
    title="Sharpness at the start, and the learning rate",
    source="Lee, Ko, Chen & Yeh 2026, arXiv 2602.04998, the analysis of the Hessian",
    question="Does the largest eigenvalue of the Hessian at the start explain why methods want "
    "different learning rates?",
    settings=SharpnessSettings,
    reproduce=reproduce,
)

__all__ = ["PAPER"]
