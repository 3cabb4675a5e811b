"""Rows -> tables, the paper's own figures among them."""

from __future__ import annotations

import pandas as pd

from ..reproduction import Table
from .claims import at_judged_rank, by_block, means, points
from .errors import NORMS
from .options import PAPER_AVERAGES, PAPER_PARTS
from .rows import AS_IT_IS
from .white_noise import leading_share

NAMES = {"loftq": "LoftQ", "pissa": "PiSSA"}


def tables(rows: pd.DataFrame, judged: dict[str, int], widths: dict[str, int]) -> list[Table]:
    chosen = at_judged_rank(rows, judged)
    found = [averages(chosen, widths), parts(chosen), norms(chosen), ranks(rows)]
    if (rows["variant"] != AS_IT_IS).any():
        found.append(grids(rows, judged))
    return [*found, everything(rows)]


def averages(chosen: pd.DataFrame, widths: dict[str, int]) -> Table:
    """The paper's rows, then ours."""
    made = []
    for (model, rank, width), by_count in PAPER_AVERAGES.items():
        for count, values in by_count.items():
            named = {NAMES[method]: value for method, value in values.items()}
            lead = f"{values['pissa'] - values['loftq']:+.1f}"
            made.append(
                {"model": f"{model} (paper)", "r": rank, "r / width, %": 100 * rank / width,
                 "T": count, **named, "PiSSA − LoftQ": lead}
            )  # fmt: skip
    table = by_block(chosen)
    for count in sorted(chosen["T"].unique()):
        leads = means(table["pissa", count] - table["loftq", count])
        values = {method: means(table[method, count]) for method in NAMES}
        for model, lead in leads.items():
            rank = int(chosen.loc[chosen["model"] == model, "rank"].iloc[0])
            named = {NAMES[method]: values[method][model].value for method in NAMES}
            made.append(
                {"model": model, "r": rank, "r / width, %": 100 * rank / widths[model], "T": count,
                 **named, "PiSSA − LoftQ": points(lead)}
            )  # fmt: skip
    frame = pd.DataFrame(made).sort_values(["model", "T"], kind="stable")
    return Table(
        "averages", "Reduction of NF4’s error at the paper’s rank per width, nuclear norm, %",
        frame, {"r / width, %": ".1f", **dict.fromkeys(NAMES.values(), ".1f")},
        note="Means over layers; brackets: 95 % interval over blocks.",
    )  # fmt: skip


def parts(chosen: pd.DataFrame) -> Table:
    """By kind of layer, beside the two references."""
    made = []
    first = chosen["T"].min()
    for part, (shape, loftq, pissa) in PAPER_PARTS.items():
        noise = 100 * leading_share(*shape, 128)
        made.append(
            {"model": "Llama-2-7B (paper)", "layer": part, "shape": f"{shape[0]} × {shape[1]}",
             "r": 128, f"LoftQ, T = {first}": loftq, "white noise": noise,
             f"PiSSA, T = {first}": pissa}
        )  # fmt: skip
    for (model, part), some in chosen.groupby(["model", "part"], sort=False):
        row = {
            "model": model, "layer": part,
            "shape": f"{some['out'].iloc[0]} × {some['in'].iloc[0]}", "r": some["rank"].iloc[0],
            "NF4 error": some["error"].mean(), "white noise": some["noise"].mean(),
            "W gets smaller by": some["smaller"].mean(),
        }  # fmt: skip
        for (count, method), values in some.groupby(["T", "method"])["nuclear"]:
            row[f"{NAMES[method]}, T = {count}"] = values.mean()
        made.append(row)
    leading = ["model", "layer", "shape", "r", "NF4 error"]
    frame = pd.DataFrame(made)
    counts = sorted(chosen["T"].unique())
    measured = [f"{name}, T = {count}" for count in counts for name in NAMES.values()]
    ordered = [measured[0], "white noise", measured[1], "W gets smaller by", *measured[2:]]
    return Table(
        "layers",
        "Reduction of NF4’s error by kind of layer at the paper’s rank per width, nuclear norm, %",
        frame[[*leading, *ordered]],
        dict.fromkeys(["NF4 error", *ordered], ".1f"),
        note="White noise: what the top r directions of a random matrix of this shape hold, more "
        "where r is a larger part of the smaller side. "
        "W gets smaller by: 100 (1 − ‖W − SVD_r(W)‖ / ‖W‖), Frobenius.",
    )  # fmt: skip


def norms(chosen: pd.DataFrame) -> Table:
    frame = chosen.groupby(["model", "T", "method"], sort=False)[list(NORMS)].mean().reset_index()
    frame = frame.sort_values(["model", "T"], kind="stable")
    frame["method"] = frame["method"].map(NAMES)
    return Table(
        "norms", "Reduction of NF4’s error by four measures, at the paper’s rank per width, %",
        frame, dict.fromkeys(NORMS, ".1f"),
        note="Output: root mean square of the layer’s output error on real inputs.",
    )  # fmt: skip


def ranks(rows: pd.DataFrame) -> Table:
    some = rows[(rows["variant"] == AS_IT_IS) & rows["detailed"]]
    frame = some.pivot_table(index=["model", "rank"], columns=["T", "method"], values="nuclear")
    frame.columns = [f"{NAMES[method]}, T = {count}" for count, method in frame.columns]
    frame = frame.reset_index()
    formats = {column: ".1f" for column in frame.columns[2:]}
    return Table(
        "ranks", "Reduction of NF4’s error by rank, nuclear norm, %", frame, formats,
        note="Of some of the blocks only, so that figures at the judged rank may differ.",
    )  # fmt: skip


def grids(rows: pd.DataFrame, judged: dict[str, int]) -> Table:
    """The weights as they are beside their controls, at the judged rank."""
    some = rows[(rows["rank"] == rows["model"].map(judged)) & rows["detailed"]]
    frame = some.pivot_table(
        index=["model", "variant"], columns=["T", "method"], values="nuclear", sort=False
    ).sort_index(axis=1)
    frame.columns = [f"{NAMES[method]}, T = {count}" for count, method in frame.columns]
    error = some.groupby(["model", "variant"])["error"].mean()
    frame.insert(0, "NF4 error", error.reindex(frame.index))
    frame = frame.reset_index().rename(columns={"variant": "weights"})
    return Table(
        "grids", "What a 4-bit grid does to the comparison, nuclear norm, %",
        frame, {column: ".1f" for column in frame.columns[2:]},
    )  # fmt: skip


def everything(rows: pd.DataFrame) -> Table:
    """Every kind of layer, rank and T, by all measures."""
    some = rows[(rows["variant"] == AS_IT_IS) & rows["detailed"]]
    frame = some.pivot_table(
        index=["model", "part", "rank", "T"], columns="method", values=list(NORMS), sort=False
    )
    frame = frame[[(norm, method) for norm in NORMS for method in NAMES]]
    frame.columns = [f"{norm}, {NAMES[method]}" for norm, method in frame.columns]
    formats = dict.fromkeys(frame.columns, ".1f")
    frame = frame.reset_index().rename(columns={"part": "layer", "rank": "r"})
    frame = frame.sort_values(["model", "r", "T"], kind="stable")
    return Table(
        "all", "Reduction of NF4’s error by model, kind of layer, rank and T, by four measures, %",
        frame, formats,
        note="Means over the blocks that are measured at every rank. Output: root mean square of "
        "the layer’s output error on real inputs.",
    )  # fmt: skip
