"""The initializations that are compared, as each library spells them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

LOFTQ_ITERATIONS = 5
LOFTQ_BITS = 4


@dataclass(frozen=True)
class Strategy:
    """One way to initialize an adapter.

    Attributes:
        ours, peft: the value of `init_lora_weights`; `peft` is None where PEFT has no such method.
        formula: the entry of `reference.FORMULAS` that computes it; None for random factors.
        reads: the data that the method needs.
        decomposes: the peers decompose whole matrices, so they are timed on a sample of layers.
    """

    ours: bool | str | Mapping[str, Any]
    peft: bool | str | None
    formula: str | None = None
    reads: Literal["inputs", "gradients"] | None = None
    decomposes: bool = False


def corda(mode: str, formula: str) -> Strategy:
    return Strategy({"name": "corda", "corda_method": mode}, "corda", formula, "inputs", True)


LOFTQ = {"name": "loftq", "loftq_bits": LOFTQ_BITS, "loftq_iter": LOFTQ_ITERATIONS}
ITERATIONS = (1, 2, 4, 16)
STRATEGIES: dict[str, Strategy] = {
    "kaiming": Strategy(True, True),
    "gaussian": Strategy("gaussian", "gaussian"),
    "orthogonal": Strategy("orthogonal", "orthogonal"),
    "olora": Strategy("olora", "olora", "qr", decomposes=True),
    "pissa": Strategy("pissa", "pissa", "svd of W", decomposes=True),
    **{
        f"pissa_niter_{count}": Strategy(f"pissa_niter_{count}", f"pissa_niter_{count}")
        for count in ITERATIONS
    },
    "corda_ipm": corda("ipm", "svd of W R"),
    "corda_kpm": corda("kpm", "svd of W R lifted"),
    "bottom": Strategy("mica", "mica", "svd of W", decomposes=True),
    "loftq": Strategy(LOFTQ, "loftq", "alternation", decomposes=True),
    # PEFT's EVA mixes forward passes and decompositions until it converges: nothing to compare.
    "eva": Strategy("eva", None, "eigh", "inputs", True),
    "lora_ga": Strategy("lora_ga", "lora_ga", "svd of G", "gradients", True),
    # No initialization at all. The GPU checks time the injection with it.
    "random": Strategy(False, False),
}
"""By name. `bottom` takes the smallest singular triplets of W; both libraries call it MiCA."""

METHODS = tuple(name for name in STRATEGIES if name != "random")
