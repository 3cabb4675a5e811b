"""The claims about QPiSSA. What varies is the block of a model: its layers are averaged first."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from .claim import Claim, Verdict, judge
from .interval import Interval, mean
from .pissa_quantization_rows import AS_IT_IS, NORMS

PAPERS = {
    1: "Llama-2-7B, r = 128: LoftQ 6.6, PiSSA 10.7; Llama-3-8B, r = 64: LoftQ 5.3, PiSSA 7.7",
    5: "Llama-2-7B, r = 128: LoftQ 14.6, PiSSA 19.4; Llama-3-8B, r = 64: LoftQ 11.2, PiSSA 14.3",
}
"""Reduction of the nuclear norm in percent, by T."""
MLP = ("gate", "up", "down")
ORDER = (
    "on every model the difference is above 0 beyond its 95 % interval over blocks; same "
    "direction: on one model, and on none below 0 beyond it; contradicts: on every model below 0 "
    "beyond it"
)
ABOVE = (("Q", "V"), ("Q", "O"), ("K", "V"), ("K", "O"), ("V", "MLP"), ("O", "MLP"))
"""The order of the paper's layers: each first one is above the second; MLP: the mean of its own."""


def by_block(rows: pd.DataFrame, norm: str = "nuclear") -> pd.DataFrame:
    """Reductions averaged over a block's layers: index (model, block), columns (method, T)."""
    return rows.pivot_table(index=["model", "block"], columns=["method", "T"], values=norm)


def at_judged_rank(rows: pd.DataFrame, judged: dict[str, int]) -> pd.DataFrame:
    """Of the weights as they are, at each model's rank of the paper's share of the width."""
    return rows[(rows["variant"] == AS_IT_IS) & (rows["rank"] == rows["model"].map(judged))]


def means(table: pd.Series) -> dict[str, Interval]:
    """Of values by (model, block): a mean over blocks a model, in the table's order."""
    models = table.index.get_level_values("model")
    return {model: mean(table[models == model].tolist()) for model in dict.fromkeys(models)}


def points(interval: Interval) -> str:
    return interval.show("+.1f")


def order(differences: Sequence[Interval]) -> Verdict:
    """The verdict on "above 0", by the criterion ORDER."""
    above = [found.above_zero for found in differences]
    below = [found.below_zero for found in differences]
    return judge(holds=all(above), direction=any(above) and not any(below), opposite=all(below))


def all_claims(rows: pd.DataFrame, judged: dict[str, int]) -> list[Claim]:
    """In the paper's order; `judged` is each model's rank."""
    chosen = at_judged_rank(rows, judged)
    counts = sorted(chosen["T"].unique())
    first, last = counts[0], counts[-1]
    return [
        lead_claim(chosen, first),
        lead_claim(chosen, last),
        iterations_claim(chosen, first, last),
        parts_claim(chosen, first),
        norms_claim(chosen, first, last),
    ]


def lead_claim(chosen: pd.DataFrame, count: int) -> Claim:
    """PiSSA > LoftQ > 0 at one T."""
    table = by_block(chosen)
    loftq, pissa = table["loftq", count], table["pissa", count]
    leads, gains = means(pissa - loftq), means(loftq)
    verdict = order(list(leads.values()))
    if not all(gain.above_zero for gain in gains.values()):
        verdict = Verdict.NOT_REPRODUCED
    ours = [
        f"{model}: LoftQ {gains[model].value:.1f}, PiSSA {means(pissa)[model].value:.1f}, "
        f"difference {points(lead)}"
        for model, lead in leads.items()
    ]
    return Claim(
        statement=f"PiSSA reduces the error of NF4 more than LoftQ does, at T = {count}",
        paper=PAPERS.get(count, "–"),
        ours="; ".join(ours) + " (percent, nuclear norm)",
        criterion=f"PiSSA minus LoftQ: {ORDER}. Not reproduced where LoftQ’s own reduction is not "
        "above 0 beyond its interval",
        verdict=verdict,
    )


def iterations_claim(chosen: pd.DataFrame, first: int, last: int) -> Claim:
    table = by_block(chosen)
    gains = {
        method: means(table[method, last] - table[method, first]) for method in ("loftq", "pissa")
    }
    ours = [
        f"{model}: LoftQ {points(gains['loftq'][model])}, PiSSA {points(gains['pissa'][model])}"
        for model in gains["loftq"]
    ]
    return Claim(
        statement="Alternating several times reduces NF4’s error further, for both methods",
        paper="Llama-2-7B, T = 1 → 5: LoftQ 6.6 → 14.6 (+8.0), PiSSA 10.7 → 19.4 (+8.7)",
        ours="; ".join(ours) + f" (points from T = {first} to {last})",
        criterion=f"gain of the last T over the first, both methods: {ORDER}",
        verdict=order([gain for by_model in gains.values() for gain in by_model.values()]),
    )


def parts_claim(chosen: pd.DataFrame, count: int) -> Claim:
    """PiSSA's reductions of Q and K against V and O, and of these against the MLP."""
    pissa = chosen[(chosen["method"] == "pissa") & (chosen["T"] == count)]
    measured = by_part(pissa, "nuclear")
    pairs = {pair: means(measured[pair[0]] - measured[pair[1]]) for pair in ABOVE}
    ends = means(measured[["Q", "K"]].mean(axis=1) - measured["MLP"])
    ours = []
    for model, end in ends.items():
        values = measured.loc[model].mean()
        listed = ", ".join(f"{part} {values[part]:.1f}" for part in ("Q", "K", "V", "O", "MLP"))
        first, second = min(ABOVE, key=lambda pair: pairs[pair][model].low)
        least = points(pairs[first, second][model])
        ours.append(
            f"{model}: {listed}; mean of Q and K less the MLP’s {points(end)}, least certain of "
            f"the six differences {first} − {second} {least}"
        )
    every = [found for by_model in pairs.values() for found in by_model.values()]
    return Claim(
        statement="PiSSA reduces NF4’s error most in Q and K, less in V and O, least in the MLP, "
        f"at T = {count}",
        paper="Llama-2-7B, r = 128: Q 19.0, K 18.1, V 8.9, O 8.9, gate 8.2, up 5.9, down 6.0",
        ours=". ".join(ours),
        criterion="Q and K each above V and above O, and V and O each above the mean of the MLP’s "
        "layers: six differences, on every model above 0 beyond their 95 % intervals over blocks; "
        "same direction: the mean of Q and K is above the MLP’s beyond its interval, on every "
        "model; contradicts: below it beyond the interval, on every model",
        verdict=judge(
            holds=all(found.above_zero for found in every),
            direction=all(end.above_zero for end in ends.values()),
            opposite=all(end.below_zero for end in ends.values()),
        ),
        remark="The shapes alone would put Q and K above the MLP: white noise of a smaller layer "
        "holds more in r directions.",
    )


def by_part(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Index (model, block), a column a part, and the MLP's mean."""
    table = rows.pivot_table(index=["model", "block"], columns="part", values=column, sort=False)
    return table.assign(MLP=table[[part for part in MLP if part in table]].mean(axis=1))


def norms_claim(chosen: pd.DataFrame, first: int, last: int) -> Claim:
    """Whether the nuclear norm's order is the others', too."""
    leads: dict[tuple[str, int], dict[str, Interval]] = {}
    for norm in NORMS[1:]:
        table = by_block(chosen, norm)
        for count in (first, last):
            leads[norm, count] = means(table["pissa", count] - table["loftq", count])
    flat = [lead for by_model in leads.values() for lead in by_model.values()]
    above = sum(lead.above_zero for lead in flat)
    below = sum(lead.below_zero for lead in flat)
    ours = []
    for model in chosen["model"].unique():
        listed = [
            f"{norm} {leads[norm, first][model].value:+.1f}, {leads[norm, last][model].value:+.1f}"
            for norm in NORMS[1:]
        ]
        ours.append(f"{model}: {'; '.join(listed)}")
    return Claim(
        statement="PiSSA’s error is below LoftQ’s in the Frobenius norm, in the spectral norm and "
        "at the layers’ outputs, too",
        paper="– (nuclear norm only)",
        ours=". ".join(ours) + f" (PiSSA minus LoftQ in points at T = {first}, {last})",
        criterion="Frobenius, spectral and output error, at the first and the last T, on every "
        "model: all differences above 0 beyond their intervals; same direction: more than half of "
        "them, and more than are below; contradicts: more than half of them below 0 beyond their "
        "intervals",
        verdict=judge(
            holds=above == len(flat),
            direction=above > len(flat) / 2 and above > below,
            opposite=below > len(flat) / 2,
        ),
        remark=f"{above} of {len(flat)} differences are above 0 beyond their intervals, {below} "
        "below it.",
        published=False,
    )
