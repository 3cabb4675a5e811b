"""What the rows say of the paper's claim.

Medians are taken on every model for itself: models differ in how far a gradient is from low rank,
and not every method is measured on each of them.
"""

from __future__ import annotations

import pandas as pd

from experiments.papers.claim import Claim, judge
from experiments.papers.first_step.measuring import CALIBRATION, FRESH, OWN_START, SUBJECT

SHARE = 0.95
NEAR_BOUND = 0.01
FAR_FROM_BOUND = 1.5
TIE = 1e-6
PLACE = ["model", "layer", "batch"]


def claims_of(rows: pd.DataFrame) -> list[Claim]:
    """All four, from the rows of `measuring.measure`; fewer where the methods they need are not
    among those measured.
    """
    rows = rows[rows["method"] != OWN_START]
    own, fresh = rows[rows["data"] == CALIBRATION], rows[rows["data"] == FRESH]
    found = [closest(own), attains(own), zero_methods(own), on_fresh_data(fresh)]
    return [claim for claim in found if claim is not None]


def closest(rows: pd.DataFrame) -> Claim:
    share, medians = share_closest(rows), median_errors(rows)
    nearest, beaten = order(medians)
    return Claim(
        statement="LoRA-GA’s first step is the closest of all methods to full fine-tuning’s",
        paper="theorem 3.1: no start of rank r is closer (no figure of its distance)",
        ours=f"closest in {share:.0%} of the layers; median error: {told(medians)}",
        criterion=f"on the data it is calibrated on: the smallest error in at least {SHARE:.0%} of "
        "the layers; same direction: the smallest median error on every model; contradicts: "
        "another method’s median is smaller on every model",
        verdict=judge(holds=share >= SHARE, direction=nearest, opposite=beaten),
    )


def attains(rows: pd.DataFrame) -> Claim:
    own = rows[rows["method"] == SUBJECT]
    # The absolute margin is for gradients of rank 2r or less, whose bound is zero.
    share = float((own["error"] <= (1 + NEAR_BOUND) * own["bound"] + 1e-3).mean())
    ratio = float((own["error"] / own["bound"].clip(lower=1e-3)).median())
    return Claim(
        statement="LoRA-GA’s first step is as close as any step of rank 2r can be: it is the "
        "gradient’s best approximation of that rank",
        paper="theorem 3.1, an identity",
        ours=f"within 1 % of the bound in {share:.0%} of the layers; its error is {ratio:.4f} of "
        "the bound (median)",
        criterion=f"within 1 % of the Eckart–Young bound in at least {SHARE:.0%} of the layers; "
        "same direction: in half of them; contradicts: the median error is more than "
        f"{FAR_FROM_BOUND} times the bound",
        verdict=judge(
            holds=share >= SHARE, direction=share >= 0.5, opposite=ratio > FAR_FROM_BOUND
        ),
    )


def zero_methods(rows: pd.DataFrame) -> Claim | None:
    """Starts with B = 0 move B alone: their step has rank r, and lies in A's rows."""
    zero = sorted(rows.loc[rows["zero_B"].astype(bool), "method"].unique())
    if not zero:
        return None
    errors = rows.pivot_table(index=PLACE, columns="method", values="error")
    shares = pd.Series(
        {name: (errors[name] > errors[SUBJECT])[errors[name].notna()].mean() for name in zero}
    )  # of the layers where it was measured
    medians = median_errors(rows)[[SUBJECT, *zero]]
    nearest, beaten = order(medians)
    where = (
        "every layer"
        if shares.min() == 1
        else f"at least {shares.min():.0%} of the layers (the fewest beside {shares.idxmin()})"
    )
    return Claim(
        statement="Starts with B = 0 follow the gradient less closely than LoRA-GA’s",
        paper="theorem 3.1: their step has rank r, its bound 2r (no figure)",
        ours=f"LoRA-GA is closer than {', '.join(zero)} in {where}; median error: {told(medians)}",
        criterion="on the calibration data each of them has a larger error than LoRA-GA in at "
        f"least {SHARE:.0%} of the layers; same direction: a larger median error on every model; "
        "contradicts: one of them has a smaller median on every model",
        verdict=judge(holds=bool((shares >= SHARE).all()), direction=nearest, opposite=beaten),
    )


def on_fresh_data(rows: pd.DataFrame) -> Claim | None:
    """Among the methods that share one gradient: those that keep the pretrained function."""
    away = rows["moved"].astype(bool)
    kept = rows[~away]
    if set(kept["method"]) == {SUBJECT}:
        return None
    share, medians = share_closest(kept), median_errors(kept)
    nearest, beaten = order(medians)
    remarks = [nearer(kept, share), of_moved(rows, sorted(rows.loc[away, "method"].unique()))]
    return Claim(
        statement="LoRA-GA’s first step is the closest on batches that no method has seen, too",
        paper="not measured there",
        ours=f"closest in {share:.0%} of all pairs of layer and batch; median error: "
        f"{told(medians)}",
        criterion="on other films, among methods that start from the pretrained function: the "
        f"smallest error in at least {SHARE:.0%} of all pairs of layer and batch; same direction: "
        "the smallest median error on every model; contradicts: another method’s median is "
        "smaller on every model",
        verdict=judge(holds=share >= SHARE, direction=nearest, opposite=beaten),
        remark=" ".join(remark for remark in remarks if remark),
        published=False,
    )


def nearer(rows: pd.DataFrame, share: float) -> str:
    """Who is closer where LoRA-GA is not."""
    if share == 1:
        return ""
    best = rows.pivot_table(index=PLACE, columns="method", values="error").idxmin(axis=1)
    who = best[best != SUBJECT].value_counts(normalize=True).head(3)
    names = ", ".join(f"{name} ({part:.0%})" for name, part in who.items())
    return f"Where another is closer it is {names}."


def of_moved(rows: pd.DataFrame, methods: list[str]) -> str:
    """The methods left out, of which one may be closer: to a gradient of its own."""
    errors = rows.pivot_table(index=PLACE, columns="method", values="error")
    closer = {name: (errors[name] < errors[SUBJECT])[errors[name].notna()] for name in methods}
    found = []
    for name, where in closer.items():
        if where.any():
            pairs = errors.loc[where.index, [name, SUBJECT]].groupby("model").median()
            medians = "; ".join(
                f"{model} {pair[name]:.2f} beside LoRA-GA’s {pair[SUBJECT]:.2f}"
                for model, pair in pairs.iterrows()
            )
            found.append(f"{name} is closer in {where.mean():.0%} (median error: {medians})")
    if not found:
        return ""
    return (
        "Left out are methods that change the model’s function first and are held against the "
        f"gradient there; of these {', '.join(found)}."
    )


def share_closest(rows: pd.DataFrame) -> float:
    """In how many layers and batches no other method has a smaller error; ties count."""
    errors = rows.pivot_table(index=PLACE, columns="method", values="error")
    others = errors.drop(columns=SUBJECT).min(axis=1)
    return float((errors[SUBJECT] <= others + TIE).mean())


def median_errors(rows: pd.DataFrame) -> pd.DataFrame:
    """By model (rows) and method (columns); nothing where a method was not measured."""
    return rows.pivot_table(
        index="model", columns="method", values="error", aggfunc="median", sort=False
    )


def order(medians: pd.DataFrame) -> tuple[bool, bool]:
    """Whether LoRA-GA's median is the smallest on every model; whether it is so on none."""
    first = medians[SUBJECT] <= medians.drop(columns=SUBJECT).min(axis=1)
    return bool(first.all()), not first.any()


def told(medians: pd.DataFrame) -> str:
    """`MiniLM 0.33, the best other eva 0.78; …`: LoRA-GA's first."""
    parts = []
    for model, found in medians.iterrows():
        others = found.drop(SUBJECT)
        parts.append(
            f"{model} {found[SUBJECT]:.2f}, the best other {others.idxmin()} {others.min():.2f}"
        )
    return "; ".join(parts)
