"""What a reproduction is: a claim of a paper, its settings, and the function that measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments.papers.findings import Findings

FORMS = ("smoke", "fast", "full")


@dataclass
class PaperSettings:
    """What every reproduction can be told; a subclass adds its own settings.

    Attributes:
        output: results go to `<output>/<form>/<name>`.
        form: the name of the YAML that it started from: smoke, fast or full.
        seed: of everything that is drawn.
        threads: CPU threads; None leaves the choice to torch.
        device: "cpu", "cuda", or "auto": an accelerator if there is one.
        rerun: measure again what is there already.
    """

    output: str = "outputs/papers"
    form: str = "fast"
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    rerun: bool = False

    OUTSIDE_IDENTITY = ("output", "threads", "rerun")

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r}; allowed are {', '.join(FORMS)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device!r}; allowed are auto, cpu and cuda")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads}; allowed are integers >= 1, and null")


@dataclass(frozen=True)
class Paper:
    """A published claim and its measurement.

    Attributes:
        name: of the module, of `conf/papers/<name>/` and of the results' folder.
        title: the heading on the page.
        source: authors, year, arXiv number, and where in the paper the claim stands.
        question: what is asked, in one sentence.
        settings: a dataclass derived from `PaperSettings`.
        reproduce: settings -> findings; reports its progress through `experiments.console.say` and
            `lora_init.progress`.
    """

    name: str
    title: str
    source: str
    question: str
    settings: type[PaperSettings]
    reproduce: Callable[[Any], Findings]
