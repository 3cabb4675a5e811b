"""The skeleton of a reproduction: options, measure, judge, tabulate, draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from .claim import Claim

FORMS = ("smoke", "fast", "full")
DEVICES = ("auto", "cpu", "cuda")
OUTSIDE_IDENTITY = ("output", "threads", "rerun")


@dataclass
class Options:
    """The options of every reproduction; a subclass adds those of one.

    Attributes:
        output: results are written to `<output>/<form>/<name>`.
        form: the name of the YAML that the options come from: smoke, fast or full.
        seed: the seed of every random draw.
        threads: CPU threads; None keeps torch's choice.
        device: "cpu", "cuda", or "auto" for an accelerator if there is one.
        rerun: measure again even if the result exists.
    """

    output: str = "outputs/papers"
    form: str = "fast"
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    rerun: bool = False

    def __post_init__(self) -> None:
        require(self, "form", self.form in FORMS, f"one of {', '.join(FORMS)}")
        require(self, "device", self.device in DEVICES, f"one of {', '.join(DEVICES)}")
        require(self, "threads", (self.threads or 1) >= 1, "an integer >= 1, or null")


def require(options: Any, name: str, supported: bool, must_be: str) -> None:
    """Refuse the value of one option unless it is supported.

    Raises:
        ValueError: it names the option, its value and what it must be.
    """
    if not supported:
        value = getattr(options, name)
        raise ValueError(f"{name}={value!r} is not supported: must be {must_be}.")


def require_at_least(options: Any, least: int, *names: str) -> None:
    """Refuse integers below `least`, and lists that hold one.

    Raises:
        ValueError: it names the option, its value and what it must be.
    """
    for name in names:
        value = getattr(options, name)
        several = isinstance(value, list)
        wanted = f"{'integers' if several else 'an integer'} >= {least}"
        require(options, name, min(value if several else [value], default=least) >= least, wanted)


def describe_options(options: Any) -> str:
    """The options that decide a result, in words."""
    kept = {key: value for key, value in asdict(options).items() if key not in OUTSIDE_IDENTITY}
    return ", ".join(f"{name} = {value}" for name, value in kept.items())


@dataclass(frozen=True)
class Table:
    """Rows that a reader may look up.

    Attributes:
        name: the name of the table's files.
        title: what the rows are, with the unit.
        frame: the rows; text columns come first.
        formats: by column, the format of its numbers (`".2f"`); others have three digits.
        note: what a reader must know, such as the paper's own figures.
    """

    name: str
    title: str
    frame: pd.DataFrame
    formats: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def summary_table(
    rows: pd.DataFrame,
    by: list[str],
    of: list[str],
    name: str,
    title: str,
    note: str = "",
    how: str = "mean",
    form: str = ".3g",
) -> Table:
    """Means (or what `how` names in pandas) of some columns by group, as a table."""
    frame = rows.groupby(by, sort=False)[of].agg(how).reset_index()
    return Table(name, title, frame, dict.fromkeys(of, form), note)


@dataclass(frozen=True)
class Figure:
    """A chart with its title and caption.

    Attributes:
        name: the name of the picture files.
        drawing: an Altair chart with its data and without a title.
        width: the width of the files in pixels; None for a chart that sets the widths of its
            panels.
    """

    name: str
    title: str
    caption: str
    drawing: Any
    width: int | None = 640


@dataclass(frozen=True)
class Measurement:
    """The rows of one measurement; everything on the page follows from them.

    Attributes:
        frames: the rows by name; `measurement["steps"]` is one frame.
        facts: what the options do not say, as label and words: models, data, the paper's setup.
    """

    options: Any
    frames: Mapping[str, pd.DataFrame]
    facts: dict[str, str]

    def __getitem__(self, name: str) -> pd.DataFrame:
        return self.frames[name]


@dataclass(frozen=True)
class Findings:
    """What one reproduction found: claims with verdicts, facts, tables, figures, discussion."""

    claims: list[Claim]
    setting: dict[str, str]
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    discussion: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reproduction:
    """A published claim and the code that measures it again.

    Attributes:
        name: the name of the module, of `conf/papers/<name>/` and of the result folder.
        title: the heading on the page.
        source: authors, year, arXiv number, and the place in the paper.
        question: the question in one sentence.
        options: a dataclass derived from `Options`.
        measure: the only function that loads models; it reports progress with
            `experiments.console.say` and `lora_init.progress`.
        judge, tabulate, draw: claims, tables and figures from the rows alone.
        caveats: sentences on the limits of the comparison.
    """

    name: str
    title: str
    source: str
    question: str
    options: type[Options]
    measure: Callable[[Any], Measurement]
    judge: Callable[[Measurement], list[Claim]]
    tabulate: Callable[[Measurement], list[Table]]
    draw: Callable[[Measurement], list[Figure]]
    caveats: tuple[str, ...] = ()

    def reproduce(self, options: Options) -> Findings:
        """Measure, then judge and draw."""
        return self.conclude(self.measure(options))

    def conclude(self, measured: Measurement) -> Findings:
        """Judge and draw the rows of a measurement."""
        return Findings(
            claims=self.judge(measured),
            setting=measured.facts | {"options": describe_options(measured.options)},
            tables=self.tabulate(measured),
            figures=self.draw(measured),
            discussion=list(self.caveats),
        )
