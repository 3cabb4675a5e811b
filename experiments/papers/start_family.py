"""A family tree of starts: which methods are the same map, and which point the same way.

A start of rank r chooses an input space (the rows of A), an output space (the columns of B), and a
product s B A. Two starts are the same map if these agree, even if their papers and code differ. All
starts are computed for the same layers, data and scaling. Nothing is trained.

Seven small claims follow from the same rows: on what the first step of LoRA-GA can capture and how
PEFT scales it, on directions that the inputs do not use, on sign G, on the eigenvalues of SC-LoRA,
and on SRR.

Sources: Yin et al. 2025 (IPA), arXiv 2509.04398; Luo et al. 2025 (SC-LoRA), arXiv 2505.23724; Liu
et al. 2026 (Astra), arXiv 2602.19111; arXiv 2602.02001 (SRR); arXiv 2505.22934 (OSRM); arXiv
2411.19557 (LoRA-SB); Wang et al. 2024 (LoRA-GA), arXiv 2407.05000.
"""

from __future__ import annotations

from collections.abc import Iterable

import altair as alt
import pandas as pd

from .application import run
from .claim import Claim, judge
from .drawing import BELOW, plot
from .interval import mean
from .reproduction import Figure, Measurement, Reproduction, Table, summary_table
from .start_family_rows import BETAS, DRAWS, IPA, LOI, UNQUANTIZED, StartFamilyOptions, measure
from .subject import file_name

EQUAL = (
    ("astra", "sc_lora, beta 0"),
    ("astra", UNQUANTIZED),
    ("eva_frozen", IPA),
    ("eva", "eva_frozen"),
    ("lora_ga, LOI", LOI),
    ("qera", "srr, none preserved"),
    ("pissa", "geora, all"),
)
"""Starts that should be the same map."""
SIGNS_OPEN = LOI
"""Its triplets mix two sets, so that the signs of B's columns and of A's rows are arbitrary: only
its spaces, which decide the first step, are compared."""
SAME = 1e-3
"""The largest distance from 1 at which an overlap or a cosine counts as the same: twice the square
of an angle of 0.02 between solvers of different accuracy."""
SIDES = {"A": "rows of A", "B": "columns of B"}
RELATIONS = {
    "same": "the same map",
    "scaled": "differ only in scale",
    "A": "the same rows of A (input space)",
    "B": "the same columns of B (output space)",
}


def judge_all(measured: Measurement) -> list[Claim]:
    """One claim on equal starts, six on what their directions contain."""
    return [
        equal_claim(measured["pairs"]),
        capture_claim(measured["gradients"]),
        scale_claim(measured["gradients"]),
        unused_claim(measured["inputs"]),
        sign_claim(measured["signs"]),
        positive_claim(measured["kept"], measured.options.rank),
        refit_claim(measured["quantized"]),
    ]


def distances(pairs: pd.DataFrame, one: str, two: str) -> pd.Series:
    """1 minus the overlap or cosine of two starts, whichever is worst, for each layer."""
    wanted = {one, two}
    rows = pairs[[{a, b} == wanted for a, b in zip(pairs["one"], pairs["two"], strict=True)]]
    compared = list(SIDES) if SIGNS_OPEN in wanted else [*SIDES, "cosine"]
    return 1 - rows[compared].min(axis=1)


def equal_claim(pairs: pd.DataFrame) -> Claim:
    """Methods that should be the same map."""
    worst = {pair: float(distances(pairs, *pair).max()) for pair in EQUAL}
    listed = "; ".join(f"{a} and {b}: {gap:.1e}" for (a, b), gap in worst.items())
    return Claim(
        statement=f"{len(EQUAL)} pairs of published starts are the same map at the right settings",
        paper="– (no paper compares them)",
        ours=f"largest distance of an overlap or cosine from 1 over all layers: {listed}",
        criterion=f"every distance at most {SAME:g}; same direction: at most 0.1; contradicts: one "
        "is above 0.5",
        verdict=judge(
            holds=max(worst.values()) <= SAME,
            direction=max(worst.values()) <= 0.1,
            opposite=max(worst.values()) > 0.5,
        ),
        published=False,
    )


def capture_claim(rows: pd.DataFrame) -> Claim:
    """PEFT's random direction draws one set of triplets for both factors."""
    ratio = mean(rows["the same set"].tolist())
    low, high = rows["low"].mean(), rows["high"].mean()
    return Claim(
        statement="With one random set of triplets for both factors, as in PEFT, LoRA-GA’s first "
        "step follows half of the gradient’s energy",
        paper="theorem 3.1 needs different sets (no figure); half by the algebra, on average",
        ours=f"share of the energy with one set, relative to different sets: {ratio.show('.2f')} "
        f"over {len(rows)} layers; a single draw has {low:.2f} to {high:.2f} (95 % of {DRAWS} "
        "draws)",
        criterion="the mean is between 0.45 and 0.55; same direction: it is below 1 beyond its "
        "interval; contradicts: it is 1 or more",
        verdict=judge(
            holds=0.45 <= ratio.value <= 0.55,
            direction=ratio.high < 1,
            opposite=ratio.value >= 1,
        ),
        published=False,
        remark="The draw decides whether the largest triplet is followed.",
    )


def scale_claim(rows: pd.DataFrame) -> Claim:
    """PEFT multiplies B by the singular values, which the authors do not."""
    plain, peft = (mean(rows[name].tolist()) for name in ("cosine", "cosine, B times S"))
    lost = mean((rows["cosine"] - rows["cosine, B times S"]).tolist())
    return Claim(
        statement="PEFT’s multiplication of B by the singular values turns LoRA-GA’s first step "
        "away from the gradient",
        paper="– (PEFT’s code differs from the authors’)",
        ours=f"cosine of the first step of SGD and the gradient: {plain.show('.3f')} as "
        f"published, {peft.show('.3f')} with B times S; difference {lost.show('.3f')}",
        criterion="the mean cosine falls by at least 0.01; same direction: it falls beyond its "
        "interval; contradicts: it rises",
        verdict=judge(
            holds=lost.value >= 0.01 and lost.low > 0,
            direction=lost.low > 0,
            opposite=lost.value < 0,
        ),
        published=False,
        remark="The default direction and scale of both. The small singular values of B’s half are "
        "what is lost.",
    )


def unused_claim(rows: pd.DataFrame) -> Claim:
    """OSRM's gain over random directions falls with the width."""
    by_width = rows.groupby("width")[["random", "least used"]].mean()
    gains = by_width["random"] - by_width["least used"]
    listed = ", ".join(f"{gain:.2%} at {width}" for width, gain in gains.items())
    falls = gains.is_monotonic_decreasing and len(gains) > 1
    return Claim(
        statement="What OSRM’s least used directions save, compared with random ones, falls with "
        "the width of the layer",
        paper="– (gains in merged accuracy at one width)",
        ours=f"share of the inputs’ energy that is avoided: {listed}",
        criterion="it falls from each width to the next; same direction: from the least to the "
        "greatest; contradicts: it rises from the least to the greatest",
        verdict=judge(
            holds=falls,
            direction=gains.iloc[-1] < gains.iloc[0],
            opposite=gains.iloc[-1] > gains.iloc[0],
        ),
        published=False,
        remark="r random directions hold r / n of the energy, so no more than that can be saved.",
    )


def sign_claim(rows: pd.DataFrame) -> Claim:
    """LoRA-SB's first step is a small part of sign G."""
    sign, plain = mean(rows["sign G"].tolist()), mean(rows["G"].tolist())
    return Claim(
        statement="r triplets hold most of Adam’s first step, from which LoRA-SB starts",
        paper="the start “approximates the first step of full fine-tuning” (no figure)",
        ours=f"share of ‖sign G‖²: {sign.show('.1%')}; of ‖G‖²: {plain.show('.1%')} (mean over "
        f"{len(rows)} layers)",
        criterion="a mean share of sign G of at least half; same direction: at least a quarter; "
        "contradicts: below a tenth",
        verdict=judge(
            holds=sign.value >= 0.5, direction=sign.value >= 0.25, opposite=sign.value < 0.1
        ),
    )


def positive_claim(rows: pd.DataFrame, rank: int) -> Claim:
    """SC-LoRA has r directions that the new data use more."""
    shares = rows.groupby("beta")["enough"].mean()
    least = rows.groupby("beta")["positive"].min()
    listed = ", ".join(
        f"beta {beta:g}: {shares[beta]:.0%} of the layers, least {least[beta]}" for beta in BETAS
    )
    return Claim(
        statement="SC-LoRA finds r directions that the new data use more than the data to keep",
        paper="assumed (r = 128, no count)",
        ours=f"layers with {rank} positive eigenvalues or more: {listed}",
        criterion="all layers at every beta; same direction: all at the smallest beta; "
        "contradicts: fewer than half at the smallest beta",
        verdict=judge(
            holds=bool((shares == 1).all()),
            direction=bool(shares[BETAS[0]] == 1),
            opposite=bool(shares[BETAS[0]] < 0.5),
        ),
    )


def refit_claim(rows: pd.DataFrame) -> Claim:
    """SRR's preserved part, compared with QERA and with a refit."""
    wide = rows.pivot_table(index=["model", "layer", "bits"], columns="method", values="error")
    ratios = {name: mean((wide[name] / wide["qera"]).tolist()) for name in wide if name != "qera"}
    listed = "; ".join(f"{name}: {ratio.show('.3f')}" for name, ratio in ratios.items())
    plain = ratios["srr"]
    return Claim(
        statement="Preserving the main directions before quantization lowers the layer’s output "
        "error compared with QERA",
        paper="lower perplexity than QERA on Llama-2-7B at 3 bits (figures of other models)",
        ours=f"output error relative to QERA’s, mean over layers and bits: {listed}",
        criterion="SRR’s mean is below 0.99 beyond its interval; same direction: below 1 beyond "
        "its interval; contradicts: above 1 beyond its interval",
        verdict=judge(holds=plain.high < 0.99, direction=plain.high < 1, opposite=plain.low > 1),
        remark="The refit is an option of this project. 2 and 4 bits are normal floats, 3 bits are "
        "even steps.",
    )


def relations(pairs: pd.DataFrame) -> pd.DataFrame:
    """Groups of starts that are related in every layer of every model, closest relation first."""
    worst = pairs.groupby(["one", "two"]).agg(
        A=("A", "min"),
        B=("B", "min"),
        cosine=("cosine", "min"),
        least=("ratio", "min"),
        most=("ratio", "max"),
    )
    equal = worst["cosine"] >= 1 - SAME
    same = equal & (worst["least"] >= 1 - 0.01) & (worst["most"] <= 1 + 0.01)
    linked = {"same": same, "scaled": equal}
    linked |= {side: worst[side] >= 1 - SAME for side in SIDES}
    rows: list[dict[str, str]] = []
    known: set[tuple[str, ...]] = set()
    for relation, words in RELATIONS.items():
        for group in groups(worst.index[linked[relation]]):
            starts = (" = " if relation == "same" else " · ").join(group)
            if tuple(group) not in known:
                known.add(tuple(group))
                rows.append({"relation": words, "starts": starts})
    return pd.DataFrame(rows, columns=["relation", "starts"])


def groups(linked: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The connected components of a graph, given by its edges."""
    found: list[set[str]] = []
    for pair in map(set, linked):
        joined = [group for group in found if group & pair]
        found = [group for group in found if not group & pair]
        found.append(pair.union(*joined))
    return sorted(map(sorted, found))


def tabulate(measured: Measurement) -> list[Table]:
    """The groups of relatives, and quantized layers."""
    return [
        Table(
            "relations",
            "Families of starts",
            relations(measured["pairs"]),
            note="In every measured layer of every model. A map is the product B A, or the Gram "
            f"matrix of the other factor where A or B is zero. The same: a cosine above {1 - SAME} "
            "and norms within 1 %. A group with a closer relation is not repeated.",
        ),
        summary_table(
            measured["quantized"],
            ["model", "bits", "method"],
            ["error"],
            "quantized",
            "Relative output errors of quantized layers with an adapter",
        ),
    ]


def draw(measured: Measurement) -> list[Figure]:
    """A heat map of overlaps for each model."""
    return [
        Figure(
            f"overlap_{file_name(str(model))}",
            f"{model}: how much the starts overlap",
            "Mean squared cosine of the principal angles, mean over layers. Lower left: the rows "
            "of A. Upper right: the columns of B. Dark: the same space. Empty: a factor is zero, "
            "or the diagonal.",
            heat_map(pairs),
            width=None,
        )
        for model, pairs in measured["pairs"].groupby("model", sort=False)
    ]


def heat_map(pairs: pd.DataFrame) -> alt.Chart:
    """Overlaps of A below the diagonal and of B above it; relatives are neighbors."""
    means = pairs.groupby(["one", "two"], as_index=False)[list(SIDES)].mean()
    both = pd.concat([means, means.rename(columns={"one": "two", "two": "one"})])
    both["either"] = both[list(SIDES)].mean(axis=1)
    order = clustered(both.pivot_table(index="one", columns="two", values="either"))
    places = {name: place for place, name in enumerate(order)}
    below = both["one"].map(places) > both["two"].map(places)
    cells = both.assign(
        overlap=both["A"].where(below, both["B"]),
        space=below.map({True: SIDES["A"], False: SIDES["B"]}),
    )[["one", "two", "overlap", "space"]].dropna()
    # A start without cells in one half would be missing on one axis only, and shift the diagonal.
    shared = {
        "sort": order,
        "scale": alt.Scale(domain=order),
        "axis": alt.Axis(title=None, labelLimit=160, grid=False),
    }
    shades = alt.Color("overlap:Q", scale=alt.Scale(scheme="blues", domain=[0, 1]), legend=BELOW)
    x, y = alt.X("two:N", **shared), alt.Y("one:N", **shared)
    return plot(cells, "rect", x, y, color=shades, width=620, height=620)


def clustered(overlaps: pd.DataFrame) -> list[str]:
    """The starts in the order of a hierarchical clustering, so that relatives are neighbors."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    gaps = (1 - overlaps.fillna(0)).clip(lower=0).to_numpy(copy=True)
    gaps = (gaps + gaps.T) / 2
    gaps[range(len(gaps)), range(len(gaps))] = 0
    order = leaves_list(linkage(squareform(gaps, checks=False), method="average"))
    return [overlaps.index[place] for place in order]


REPRODUCTION = Reproduction(
    name="start_family",
    title="A family tree of starts",
    source="SC-LoRA, Astra, IPA, SRR, OSRM, LoRA-SB, LoRA-GA (arXiv numbers in the module)",
    question="Which of the published starts are the same map, and which share a space?",
    options=StartFamilyOptions,
    measure=measure,
    judge=judge_all,
    tabulate=tabulate,
    draw=draw,
    caveats=(
        "Random starts share their numbers here, because all starts have one seed. Starts that "
        "share a space can still differ in scale, in which factor is zero, and in what is trained. "
        "The map says nothing about the accuracy after training.",
    ),
)

if __name__ == "__main__":
    run(REPRODUCTION)
