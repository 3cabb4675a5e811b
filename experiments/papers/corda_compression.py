"""CorDA: does a model need the components that CorDA calls the smallest?

Every linear layer of the blocks loses its q smallest components. The perplexity on held-out text
measures the cost. Each method leaves a projection of the weight, W - P PᵀW. They differ in the q
output directions P that they call the smallest (see `projections`):

    plain SVD            left singular vectors of W
    ASVD                 of W diag(mean |x|)^alpha
    CorDA                of W R, R = X Xᵀ / tokens
    whitened             of W L, R = L Lᵀ; this P has the least mean square error of the output

Source: Yang et al. 2024, "CorDA", NeurIPS 2024, arXiv 2406.05223, table 1 and figure 2; Yuan et al.
2023, "ASVD", arXiv 2312.05821; Wang et al. 2024, "SVD-LLM", arXiv 2403.07378 (whitening).
"""

from __future__ import annotations

import altair as alt

from .application import run
from .claim import Claim
from .corda_compression_claims import all_claims
from .corda_compression_rows import CordaCompressionOptions, measure
from .drawing import LOG, color, plot
from .reproduction import Figure, Measurement, Reproduction, Table

PAPERS = (
    "The paper, at 0.39, 3.1, 12.5 and 25 % of Llama-2-7B (whole: 5.47): plain SVD 6.32, 18.03, "
    "25.42, 73.92; ASVD 6.08, 8.71, 12.37, 20.34; CorDA 5.48, 5.50, 5.69, 6.35."
)


def whole_model(measured: Measurement) -> tuple[float, int]:
    """The perplexity and the width of the whole model."""
    row = measured["model"].iloc[0]
    return float(row["perplexity"]), int(row["width"])


def judge_all(measured: Measurement) -> list[Claim]:
    """Four claims of the paper, and one question that this project adds."""
    return all_claims(measured["compressed"], *whole_model(measured))


def tabulate(measured: Measurement) -> list[Table]:
    """Perplexity by method, calibration and dropped share."""
    frame = measured["compressed"].drop(columns="losses")
    return [
        Table(
            "perplexity",
            "Perplexity by the share of components dropped (whole model: "
            f"{whole_model(measured)[0]:.2f})",
            frame,
            {"fraction": ".2%", "perplexity": ".4g", "nats": ".3f", "error": ".3f"},
            "corpus and tokens: of the calibration. nats: the loss above the whole model’s, with "
            f"its standard error over blocks. {PAPERS}",
        )
    ]


def draw(measured: Measurement) -> list[Figure]:
    """Perplexity against the dropped share, by calibration."""
    frame = measured["compressed"].drop(columns="losses")
    calibration = frame["corpus"] + ", " + frame["tokens"].astype(str)
    drawn = frame.assign(
        label=frame["method"] + " (" + calibration + ")",
        ratio=frame["perplexity"] / whole_model(measured)[0],
    )
    labels = drawn["label"].unique().tolist()
    return [
        Figure(
            "fractions",
            "What it costs to drop the smallest components",
            "Perplexity relative to the whole model’s. In brackets: the calibration’s corpus and "
            "tokens.",
            plot(
                drawn,
                "line",
                alt.X("fraction:Q", title="share dropped", scale=LOG, axis=alt.Axis(format="~%")),
                alt.Y("ratio:Q", title="perplexity / whole model’s", scale=LOG),
                color=color("label", labels),
            ),
        )
    ]


REPRODUCTION = Reproduction(
    name="corda_compression",
    title="CorDA: dropping the smallest components",
    source="Yang et al. 2024, arXiv 2406.05223, table 1 and figure 2",
    question="Does a model keep its perplexity when every linear layer loses the components that "
    "CorDA calls the smallest?",
    options=CordaCompressionOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
)

if __name__ == "__main__":
    run(REPRODUCTION)
