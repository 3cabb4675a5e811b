"""The strategies that are compared: how each library is asked, and what is looked at beside time.

`bottom`, the smallest singular triplets of every weight, is asked for as MiCA, the method that is
built on them and on nothing else. LoftQ is asked for in the paper's
form on both sides: T = 5 alternations, NF4. LoRA-GA's gradients need a loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

LOFTQ_ITERATIONS = 5
LOFTQ_BITS = 4

Calibration = Literal["inputs", "gradients"]


@dataclass(frozen=True)
class Demand:
    """A figure of quality and the value it has to keep.

    Attributes:
        figure: its name among a row's figures of quality.
        limit: the most (or the least) that ours may be; None: as good as PEFT's.
        least: whether `limit` is a lower bound.
    """

    figure: str
    limit: float | None = None
    least: bool = False


@dataclass(frozen=True)
class Strategy:
    """One way to start, as both libraries are asked for it.

    Attributes:
        ours, peft: the value of `init_lora_weights`; PEFT's is None where it has no such method.
        calibration: which data it needs.
        drawn: factors are drawn, not computed: the whole call is compared, since what it takes
            beyond `init_lora_weights=False` (which draws too) is noise.
        exact: the straightforward computation in `exact.py`.
        full: PEFT decomposes in full: its cost depends on no rank.
        demand: the quality that belongs to the speed (`judging.py` has all figures).
    """

    ours: bool | str | Mapping[str, Any]
    peft: bool | str | None
    calibration: Calibration | None = None
    drawn: bool = False
    exact: str | None = None
    full: bool = False
    demand: Demand | None = None


OVERLAP = Demand("overlap", 0.999, least=True)


def pissa_niter(count: int) -> Strategy:
    name = f"pissa_niter_{count}"
    return Strategy(name, name, demand=Demand("excess"))


STRATEGIES: dict[str, Strategy] = {
    "kaiming": Strategy(True, True, drawn=True),
    "gaussian": Strategy("gaussian", "gaussian", drawn=True),
    "orthogonal": Strategy("orthogonal", "orthogonal", drawn=True),
    "olora": Strategy("olora", "olora", exact="qr", full=True, demand=Demand("difference", 1e-6)),
    "pissa": Strategy("pissa", "pissa", exact="svd", full=True, demand=Demand("excess", 1e-4)),
    "pissa_niter_1": pissa_niter(1),
    "pissa_niter_2": pissa_niter(2),
    "pissa_niter_4": pissa_niter(4),
    "pissa_niter_16": pissa_niter(16),
    "corda_ipm": Strategy(
        {"name": "corda", "corda_method": "ipm"}, "corda", "inputs", exact="svd of W R", full=True,
        demand=Demand("excess of W R", 1e-4),
    ),
    "corda_kpm": Strategy(
        {"name": "corda", "corda_method": "kpm"}, "corda", "inputs", exact="svd of W R", full=True,
        demand=OVERLAP,
    ),
    "bottom": Strategy("mica", "mica", exact="svd", full=True, demand=OVERLAP),
    "loftq": Strategy(
        {"name": "loftq", "loftq_bits": LOFTQ_BITS, "loftq_iter": LOFTQ_ITERATIONS}, "loftq",
        exact="alternation", demand=Demand("objective over exact", 1e-3),
    ),
    "eva": Strategy("eva", "eva", "inputs", exact="eigh", demand=OVERLAP),
    "lora_ga": Strategy("lora_ga", "lora_ga", "gradients", exact="svd of G"),
    "random": Strategy(False, False, drawn=True),
}  # fmt: skip
"""By name. `random` is `init_lora_weights=False`, the call that the others are measured above."""

METHODS = tuple(name for name in STRATEGIES if name != "random")
