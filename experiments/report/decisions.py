"""Which start to begin with, from the sweeps and reproductions of this repository.

`python -m experiments.report.decisions` writes `docs/which-start.md` and the three sentences that
open README.md, from the page of the small protocol and the verdicts of the reproductions. Nothing
is chosen by hand: a start is named only if a sweep resolved that it is better than the baseline and
not worse in the score, or if a claim about it was reproduced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_init import list_initializers

from .cells import judged_text, listing, mantissa, short_sentences
from .judgement import BETTER, NOT_RESOLVED, TIE, WORSE, Judgement
from .palette import BASELINE
from .published import PublishedSweep, read_page
from .quantities import SCORE
from .situations import SITUATIONS, Situation
from .table import Table

START, END = "<!-- which start: begin -->", "<!-- which start: end -->"
HEADERS = ("you have", "begin with", "rate", "our sweep", "papers’ claims, measured again")
CLAIM_HEADERS = ("claim", "verdict", "the paper", "ours")
UNKNOWN = "not known"


@dataclass(frozen=True)
class Decision:
    """What the evidence says about a situation, as text for a row of the table."""

    situation: Situation
    start: str
    rate: str
    ours: str
    claims: tuple[dict[str, str], ...]

    def cells(self) -> list[str]:
        start = quoted(self.start) if self.start != UNKNOWN else UNKNOWN
        papers = "; ".join(f"{one['statement']}: **{one['verdict']}**" for one in self.claims)
        return [self.situation.label, start, self.rate, self.ours, papers or "none"]


def decide(sweep: PublishedSweep, verdicts: dict[str, list[dict[str, str]]]) -> list[Decision]:
    """A decision for each situation."""
    return [decision(situation, sweep, verdicts) for situation in SITUATIONS]


def decision(
    situation: Situation, sweep: PublishedSweep, verdicts: dict[str, list[dict[str, str]]]
) -> Decision:
    known = [one for one in sweep.judgements if one.arm in candidates(situation.data)]
    mine = [one for one in known if one.quantity.name == situation.quantity]
    worse = {one.arm for one in known if one.quantity == SCORE and one.verdict == WORSE}
    better = [one for one in mine if one.verdict == BETTER and one.arm not in worse]
    claims = [(claim(verdicts, place, text), start) for place, text, start in situation.claims]
    reproduced = [start for one, start in claims if start and one["verdict"] == "reproduced"]
    if better:
        best = max(better, key=lambda one: abs(np.log(one.value)) if one.factor else one.value)
        start = best.arm
    elif reproduced and not mine:
        start = reproduced[0]
    else:
        start = BASELINE if mine else UNKNOWN
    papers = tuple(one for one, _ in claims)
    return Decision(situation, start, rate(start, sweep), evidence(mine, sweep), papers)


def candidates(data: bool) -> set[str]:
    """The starts for a float base; without data, those that read neither inputs nor gradients."""
    return {
        spec.name
        for spec in list_initializers()
        if "quantizer" not in spec.reads and (data or not spec.reads & {"inputs", "gradient"})
    }


def claim(verdicts: dict[str, list[dict[str, str]]], place: str, text: str) -> dict[str, str]:
    """The verdict on one claim, by the beginning of its statement."""
    found = [one for one in verdicts.get(place, []) if one["statement"].startswith(text)]
    if len(found) != 1:
        raise ValueError(
            f"claim={text!r} is not supported: must begin one statement of {place!r} in the "
            "verdicts. Change SITUATIONS."
        )
    return found[0]


def evidence(mine: list[Judgement], sweep: PublishedSweep) -> str:
    """What the sweep resolved in the quantity that counts."""
    if not mine:
        return "none: no sweep here measures it"
    parts = []
    for verdict in (BETTER, WORSE, TIE, NOT_RESOLVED):
        found = [f"`{one.arm}` {judged_text(one)}" for one in mine if one.verdict == verdict]
        if found:
            parts.append(f"{verdict}: {', '.join(found)}")
    label = sweep.metric if mine[0].quantity == SCORE else mine[0].quantity.label
    return f"{label} against `{BASELINE}`. {'; '.join(parts)}"


def rate(start: str, sweep: PublishedSweep) -> str:
    """A start's chosen rate as a multiple of the baseline's."""
    if start in sweep.rates and BASELINE in sweep.rates:
        multiple = sweep.rates[start] / sweep.rates[BASELINE]
        return f"×{multiple:.2g}" + (" (at the edge)" if start in sweep.at_edge else "")
    return "not measured: search it"


def sentences(sweep: PublishedSweep, decisions: list[Decision]) -> tuple[str, str, str]:
    """What opens the README."""
    score = [one for one in sweep.judgements if one.quantity == SCORE]
    better = [one.arm for one in score if one.verdict == BETTER]
    widest = max(max(abs(one.low), abs(one.high)) for one in score)
    if better:
        first = (
            f"Begin with {listing(map(quoted, better))}: at its own best rate, it has a resolved "
            f"gain in {sweep.metric} over `{BASELINE}`."
        )
    else:
        first = (
            f"Begin with `{BASELINE}`: no other start has a resolved gain in {sweep.metric} at its "
            f"own best rate. Differences of up to {100 * widest:.0f} points stay possible."
        )
    lower: dict[str, list[str]] = {}
    for arm in sweep.rates:
        if sweep.rates[arm] != sweep.rates[BASELINE]:
            lower.setdefault(rate(arm, sweep), []).append(arm)
    groups = [f"{listing(map(quoted, arms))} {multiple}" for multiple, arms in lower.items()]
    second = (
        "Search the learning rate again when you change the start. As multiples of "
        f"`{BASELINE}`’s, the best rates were {'; '.join(groups)}."
    )
    worse = [
        f"`{one.arm}` ({judged_text(one, brief=True)})"
        for one in sweep.judgements
        if one.quantity.name == "forgetting" and one.verdict == WORSE
    ]
    verb = "forgets" if len(worse) == 1 else "forget"
    forgets = [f"{listing(worse)} {verb} more than `{BASELINE}`"] if worse else []
    four_bit = [one for one in decisions if one.situation.label.startswith("a 4-bit base")]
    parts = [*forgets, *(f"For {d.situation.label}, begin with `{d.start}`" for d in four_bit)]
    return first, second, " ".join(f"{part}." for part in parts)


def quoted(name: str) -> str:
    return f"`{name}`"


def page(sweep: PublishedSweep, verdicts: dict[str, list[dict[str, str]]]) -> str:
    """The Markdown of `docs/which-start.md`."""
    decisions = decide(sweep, verdicts)
    facts = sweep.facts
    described = (
        f"The sweep: {facts.get('Model')} on {facts.get('Data')}, {facts.get('Training')}, rank "
        f"{facts.get('Rank')}, seeds {facts.get('Seeds')}, {facts.get('Held out')} held out. Each "
        "start has its own learning rate, chosen on validation data. Differences are paired over "
        "seeds, with 95 % intervals and Holm’s correction. A tie lies within a stated margin; not "
        "resolved means that the runs cannot tell."
    )
    baseline = sweep.rates[BASELINE]
    rates = [
        [quoted(arm), mantissa(value), f"{value / baseline:.2g}"]
        for arm, value in sorted(sweep.rates.items(), key=lambda item: -item[1])
    ]
    lines = [
        "# Which start?",
        "Written by `python -m experiments.report.decisions`; do not edit.",
        "\n\n".join(sentences(sweep, decisions)),
        described + ' <a href="protocol.html">The whole report</a>. {doc}`evidence` has more.',
        words("What to begin with", HEADERS, [one.cells() for one in decisions]),
        "A resolved difference is “better” or “worse”. “Reproduced” speaks of our small models.",
        words("The claims", CLAIM_HEADERS, claim_rows(decisions)),
        words("The rate to begin with", ("start", "best rate", f"times {BASELINE}’s"), rates),
        "## What the evidence does not say",
        "\n".join(f"- {line}" for line in silent(sweep, decisions)),
    ]
    return "\n\n".join(line.rstrip() for line in lines) + "\n"


def words(title: str, headers: Sequence[str], rows: list[list[str]]) -> str:
    """A table of words in Markdown."""
    return Table(title, headers, rows, align="---").markdown()


def claim_rows(decisions: list[Decision]) -> list[list[str]]:
    """Each claim once, with the paper's figure and ours."""
    claims = {one["statement"]: one for decision in decisions for one in decision.claims}
    keys = ("statement", "verdict", "paper", "ours")
    return [[one[key] for key in keys] for one in claims.values()]


def silent(sweep: PublishedSweep, decisions: list[Decision]) -> list[str]:
    """What no figure here answers."""
    facts = sweep.facts
    open_ = [one for one in sweep.judgements if one.verdict == NOT_RESOLVED]
    counts = {q: sum(one.quantity == q for one in open_) for q in {o.quantity for o in open_}}
    ordered = [q for q in dict.fromkeys(one.quantity for one in sweep.judgements) if q in counts]
    return [
        f"Larger models, other data and longer training: the sweep is {facts.get('Model')}, "
        f"{facts.get('Training')}, and the reproductions use models of up to 135M parameters.",
        short_sentences(
            "Not resolved in the sweep",
            [
                f"{sweep.metric if q == SCORE else q.label} ({counts[q]} of "
                f"{sum(one.quantity == q for one in sweep.judgements)})"
                for q in ordered
            ],
        ),
        *(
            f"{one.situation.label[0].upper()}{one.situation.label[1:]}: no sweep or reproduction "
            "here decides it."
            for one in decisions
            if one.start == UNKNOWN
        ),
        f"Starts other than {listing(map(quoted, sweep.rates))}: no sweep here has tuned them.",
    ]  # fmt: skip


def with_sentences(readme: str, three: tuple[str, str, str]) -> str:
    """The README with today's three sentences between its two markers."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"README.md must have the lines {START} and {END}")
    return f"{before}{START}\n" + "\n".join(three) + f"\n{END}{after}"


def main(root: Path) -> None:
    """Write both files below `root`, the repository."""
    sweep = read_page(root / "docs" / "protocol.html")
    verdicts = json.loads((root / "docs" / "papers" / "verdicts.json").read_text("utf-8"))
    (root / "docs" / "which-start.md").write_text(page(sweep, verdicts), encoding="utf-8")
    readme = root / "README.md"
    three = sentences(sweep, decide(sweep, verdicts))
    readme.write_text(with_sentences(readme.read_text("utf-8"), three), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())
