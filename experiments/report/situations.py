"""The cases that `docs/which-start.md` decides, and the claims that bear on each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Situation:
    """A practitioner's case.

    Attributes:
        label: what the practitioner has.
        quantity: what counts, by its name; empty if no sweep here measures the case.
        data: whether starts that read data may be used.
        claims: reproduction, beginning of the statement, and the start that it speaks for.
    """

    label: str
    quantity: str
    data: bool = True
    claims: tuple[tuple[str, str, str], ...] = ()


SITUATIONS = (
    Situation("a float base without data", "score", data=False),
    Situation(
        "a float base with data", "score", claims=(
            ("eva_variance", "EVA’s first gradient of B is larger", ""),
            ("corda_knowledge", "CorDA’s instruction-previewed mode learns more", ""),
        ),
    ),
    Situation(
        "a base whose knowledge must stay", "forgetting", claims=(
            ("corda_knowledge", "In its knowledge-preserved mode CorDA changes", "corda"),
            ("corda_knowledge", "After its knowledge-preserved mode CorDA is better", "corda"),
        ),
    ),
    Situation(
        "few steps (the sweep has 60)", "score", claims=(
            ("first_step", "LoRA-GA’s first step is the closest of all methods", ""),
        ),
    ),
    Situation("many steps", ""),
    Situation(
        "a 4-bit base without data", "", data=False, claims=(
            ("pissa_quantization", "PiSSA reduces the error of NF4 more than LoftQ does, at T = 5",
             "qpissa"),
            ("pissa_quantization", "PiSSA reduces the error of NF4 more than LoftQ does, at T = 1",
             "qpissa"),
        ),
    ),
    Situation(
        "a 4-bit base with data", "", claims=(
            ("loftq_iterations", "QERA’s closed form has a lower output error than LoftQ", "qera"),
            ("loftq_iterations", "QERA’s lower output error shows in perplexity", "qera"),
        ),
    ),
)  # fmt: skip
