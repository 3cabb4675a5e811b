"""The page of results in Markdown: sentences that explain the tables, then the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from . import calibration, experts, initialization, memory, sharded, steps
from .quality import JUDGES, MEANINGS
from .row import LINALG, OURS, PEFT, Row

NOTHING = "–"
TITLES = {
    "initialization": initialization.TITLE,
    "calibration": calibration.TITLE,
    "memory": memory.TITLE,
    "steps": steps.TITLE,
    "experts": experts.TITLE,
    "sharded": sharded.TITLE,
}
INTRODUCTIONS = {
    "initialization": """\
The time is that of the whole `get_peft_model` call without passes over data. A note such as "8 of
210 layers" means that all contenders adapt the same sample of layers, because the peer decomposes
whole matrices; "whole model" is then the time of lora_init for all layers. torch.linalg is the
textbook computation in float32, without an adapter. The error is the largest over the sampled
layers, compared with float64; 0 is exact. Layers that are too large for a float64 decomposition
have no error:

""",
    "calibration": """\
lora_init collects second moments during forward passes. The figure is the time of that pass divided
by the time of plain forward passes over the same batches.
""",
    "memory": """\
The peak above the loaded model during `get_peft_model`, in a fresh process for each library. The
plan's estimate is what `dry_run=True` promises at most.
""",
    "steps": """\
A step is forward, backward and AdamW on real batches, with adapters on all linear layers. Both
libraries start from the same factors. The last column is the largest relative difference of their
losses.
""",
    "experts": """\
The model is a mixture of experts with random weights. Adapters are on the query and value
projections and on all experts. The floor is a step with the projections only, so it is what the
base needs. Memory is the peak during a step above the adapted model. The starts adapt all experts
of the model, whose weights follow a power law there. The error of a step is the relative
difference of the first losses, that of PiSSA an excess as above.
""",
    "sharded": """\
The base is sharded by `fully_shard` over processes of one machine, one thread each. Memory is the
largest peak of a rank during `get_peft_model` above its shard. The promise for several ranks is
the peak of one rank, which is that of all factors and the work space, plus one layer. The time is
that of the slowest rank. It falls with ranks as long as each has a core. gloo copies every layer
through the memory of one machine, so a method that computes little gains nothing.
""",
}

Cell = Callable[[Row], str]


def page_of(rows: Sequence[Row], known: dict[str, Any], status: str) -> str:
    """Return the page; an unfinished run says so."""
    parts = [
        "# Performance\n",
        "`make benchmark` generates this page. It compares lora_init with Hugging Face PEFT and "
        "with plain `torch.linalg`\nin one run on one machine.\n",
        f"{machine_line(known)}\n",
    ]
    if status != "finished":
        parts.append(
            "**This run did not finish.** The figures below were measured before it ended.\n"
        )
    parts.append(
        "A ratio is the peer's figure divided by that of lora_init: above 1, lora_init takes less. "
        "Contenders alternate.\nTimes are medians. A ratio is the median over rounds, with a 95 % "
        "bootstrap interval from five rounds on.\n"
    )
    parts.append("![The time of each initialization](benchmark.png)\n")
    for section, title in TITLES.items():
        chosen = [row for row in rows if row.section == section]
        if chosen:
            parts.append(f"## {title}\n")
            parts.append(introduction(section))
            for _, group in groupby(chosen, lambda row: (row.model, row.rank)):
                parts.append(section_table(section, list(group)))
    return "\n".join(parts)


def machine_line(known: dict[str, Any]) -> str:
    place = known["gpu"] if known["device"].startswith("cuda") else f"{known['threads']} threads"
    packages = known["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft"))
    shared = " The machine was shared with other work." if known["shared"] else ""
    return f"Measured on {known['date']}: {known['cpu']}, {place}; {versions}.{shared}"


def introduction(section: str) -> str:
    text = INTRODUCTIONS[section]
    if section == "initialization":
        for kind, meaning in MEANINGS.items():
            methods = [method for method, judge in JUDGES.items() if judge.kind == kind]
            text += f"- {kind} ({', '.join(methods)}): {meaning}.\n"
    return text


def section_table(section: str, rows: Sequence[Row]) -> str:
    """Return the table of one model and rank."""
    rank = "" if rows[0].rank is None else f", rank {rows[0].rank}"
    return f"**{rows[0].model}{rank}**\n\n{table(rows, COLUMNS[section])}"


def table(rows: Sequence[Row], columns: dict[str, Cell]) -> str:
    """Return a Markdown table without the columns that are empty in all rows."""
    kept = {
        name: cell for name, cell in columns.items() if any(cell(row) != NOTHING for row in rows)
    }
    rule = [":---" if name in LEFT else "---:" for name in kept]
    lines = [list(kept), rule, *([cell(row) for cell in kept.values()] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def amount(value: float | None, unit: str) -> str:
    if value is None:
        return NOTHING
    if unit == "s":
        return f"{value:.2f} s" if abs(value) >= 0.9995 else f"{1e3 * value:.3g} ms"
    return f"{value:.1f} MiB" if unit == "MiB" else f"{value:.2f} ×"


def ratio(row: Row) -> str:
    """Return the ratio with its interval, and its peer if that is not PEFT."""
    if row.ratio is None:
        return NOTHING
    text = f"{row.ratio.estimate:.3g}"
    if row.ratio.interval is not None:
        text += " [{:.3g}, {:.3g}]".format(*row.ratio.interval)
    return f"{text} ({row.peer})" if row.peer == LINALG else text


def error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1e}"


LEFT = ("method", "layers", "adapter", "case", "note", "kind")
NOTE: dict[str, Cell] = {"note": lambda row: row.note or NOTHING}
TIMES: dict[str, Cell] = {
    OURS: lambda row: amount(row.ours, row.unit),
    PEFT: lambda row: amount(row.peft, row.unit),
    LINALG: lambda row: amount(row.linalg, row.unit),
    "ratio": ratio,
}
COLUMNS: dict[str, dict[str, Cell]] = {
    "initialization": {
        "method": lambda row: row.case,
        **TIMES,
        "whole model": lambda row: amount(row.whole, row.unit),
        "error": lambda row: error(row.error),
        "PEFT's error": lambda row: error(row.peft_error),
        "kind": lambda row: row.kind or NOTHING,
        **NOTE,
    },
    "calibration": {
        "layers": lambda row: row.case,
        "with statistics": lambda row: amount(row.ours, row.unit),
        "plain passes": lambda row: amount(row.whole, row.unit),
        "multiple of plain passes": ratio,
        **NOTE,
    },
    "memory": {
        "method": lambda row: row.case,
        **TIMES,
        "plan's estimate": lambda row: amount(row.planned, row.unit),
        **NOTE,
    },
    "steps": {
        "adapter": lambda row: row.case,
        **TIMES,
        "loss difference": lambda row: error(row.error),
        **NOTE,
    },
    "experts": {
        "case": lambda row: row.case,
        **TIMES,
        "floor": lambda row: amount(row.whole, row.unit),
        "error": lambda row: error(row.error),
        **NOTE,
    },
    "sharded": {
        "case": lambda row: row.case,
        OURS: lambda row: amount(row.ours, row.unit),
        "promise": lambda row: amount(row.planned, row.unit),
        **NOTE,
    },
}
"""By section, the columns and their cells."""
