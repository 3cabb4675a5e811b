"""What the rows say of the paper's claim."""

from __future__ import annotations

import pandas as pd

from experiments.papers.first_step.measuring import CALIBRATION, FRESH, OWN_START, SUBJECT
from experiments.papers.verdicts import Claim, Verdict, judge

SHARE = 0.95
NEAR_BOUND = 0.01
TIE = 1e-6
PLACE = ["model", "layer", "batch"]


def claims_of(rows: pd.DataFrame) -> list[Claim]:
    """All four, from the rows of `measuring.measure`."""
    rows = rows[rows["method"] != OWN_START]
    return [
        closest(rows[rows["data"] == CALIBRATION]),
        attains(rows[rows["data"] == CALIBRATION]),
        zero_methods(rows[rows["data"] == CALIBRATION]),
        on_fresh_data(rows[rows["data"] == FRESH]),
    ]


def closest(rows: pd.DataFrame) -> Claim:
    share, medians = share_closest(rows), median_errors(rows)
    nearest = medians.index[0] == SUBJECT
    return Claim(
        statement="LoRA-GA’s first step is the closest of all methods to full fine-tuning’s",
        paper="theorem 3.1: no start of rank r is closer (no figure of its distance)",
        ours=f"closest in {share:.0%} of the layers; median error {medians[SUBJECT]:.2f}, "
        f"{next_best(medians)}",
        criterion=f"on the data it is calibrated on: the smallest error in {SHARE:.0%} of the "
        "layers or more; same direction: the smallest median error",
        verdict=judge(holds=share >= SHARE, direction=nearest, opposite=not nearest),
    )


def attains(rows: pd.DataFrame) -> Claim:
    own = rows[rows["method"] == SUBJECT]
    # The absolute margin is for gradients of rank 2r or less, whose bound is zero.
    share = float((own["error"] <= (1 + NEAR_BOUND) * own["bound"] + 1e-3).mean())
    ratio = float((own["error"] / own["bound"].clip(lower=1e-3)).median())
    return Claim(
        statement="It attains what any step of rank 2r can: the gradient’s best approximation of "
        "that rank",
        paper="theorem 3.1, an identity",
        ours=f"within 1 % of the bound in {share:.0%} of the layers; median {ratio:.4f} of it, "
        f"which is an error of {own['bound'].median():.2f}",
        criterion=f"within 1 % of the Eckart–Young bound in {SHARE:.0%} of the layers or more; "
        "same direction: in half of them",
        verdict=judge(holds=share >= SHARE, direction=share >= 0.5, opposite=ratio > 1.5),
    )


def zero_methods(rows: pd.DataFrame) -> Claim:
    """Starts with B = 0 move B alone: their step has rank r, and lies in A's rows."""
    errors = rows.pivot_table(index=PLACE, columns="method", values="error")
    zero = sorted(rows.loc[rows["zero_B"], "method"].unique())
    worse = errors[zero].gt(errors[SUBJECT], axis=0)
    shares = worse.mean()
    medians = median_errors(rows)
    best = medians[zero].idxmin()
    return Claim(
        statement="Starts with B = 0 follow the gradient less",
        paper="theorem 3.1: their step has rank r, its bound 2r (no figure)",
        ours=f"{len(zero)} methods start at B = 0; LoRA-GA is closer than each of them in "
        f"{shares.min():.0%} of the layers or more; the best of them is {best} with a median error "
        f"of {medians[best]:.2f}",
        criterion=f"on the calibration data each of them has a larger error than LoRA-GA in "
        f"{SHARE:.0%} of the layers or more; same direction: a larger median error",
        verdict=judge(
            holds=bool((shares >= SHARE).all()),
            direction=bool((medians[zero] > medians[SUBJECT]).all()),
            opposite=bool((medians[zero] < medians[SUBJECT]).any()),
        ),
    )


def on_fresh_data(rows: pd.DataFrame) -> Claim:
    share, medians = share_closest(rows), median_errors(rows)
    nearest = medians.index[0] == SUBJECT
    own = rows[rows["method"] == SUBJECT]
    verdict = judge(holds=share >= SHARE, direction=nearest, opposite=not nearest)
    return Claim(
        statement="The order holds on batches that no method has seen",
        paper="not measured there",
        ours=f"closest in {share:.0%} of the layers and batches; median error "
        f"{medians[SUBJECT]:.2f} (best possible {own['bound'].median():.2f}), {next_best(medians)}",
        criterion=f"on other films: the smallest error in {SHARE:.0%} of all pairs of layer and "
        "batch; same direction: the smallest median error",
        verdict=verdict,
        remark="" if verdict is Verdict.REPRODUCED else nearer_on_fresh_data(rows),
    )


def nearer_on_fresh_data(rows: pd.DataFrame) -> str:
    """Who is closer than LoRA-GA, and what is left among methods that keep the function."""
    errors = rows.pivot_table(index=PLACE, columns="method", values="error")
    closest = errors.idxmin(axis=1)
    who = closest[closest != SUBJECT].value_counts(normalize=True)
    told = ", ".join(f"{name} {part:.0%}" for name, part in who.head(3).items())
    kept = share_closest(rows[~rows["moved"].astype(bool)])
    changed = sorted(set(rows.loc[rows["moved"].astype(bool), "method"]) & set(who.index))
    also = (
        f" {' and '.join(changed)} changed the model’s function first and is held against the "
        "gradient there."
        if changed
        else ""
    )
    return (
        f"Where another is closer it is {told}.{also} Among methods that start from the "
        f"pretrained function LoRA-GA is closest in {kept:.0%}."
    )


def share_closest(rows: pd.DataFrame) -> float:
    """In how many layers and batches no other method has a smaller error; ties count."""
    errors = rows.pivot_table(index=PLACE, columns="method", values="error")
    others = errors.drop(columns=SUBJECT).min(axis=1)
    return float((errors[SUBJECT] <= others + TIE).mean())


def median_errors(rows: pd.DataFrame) -> pd.Series:
    """By method, the smallest first."""
    return rows.groupby("method")["error"].median().sort_values()


def next_best(medians: pd.Series) -> str:
    other = medians.drop(SUBJECT)
    return f"next {other.index[0]} with {other.iloc[0]:.2f}"
