"""Contenders take turns: one call each a round, in an order that favours none of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lora_init.progress import tracked


@dataclass(frozen=True)
class Contender:
    """What is timed: `run(prepare(round))`, of which only `run` counts."""

    prepare: Callable[[int], Any]
    run: Callable[[Any], Any]


@dataclass(frozen=True)
class Turn:
    """One measured call. `result` is what it returned; let go of it before the next turn."""

    round: int
    contender: str
    seconds: float
    result: Any


def take_turns(
    contenders: dict[str, Contender], rounds: int, device: torch.device, description: str
) -> Iterator[Turn]:
    """Each round every contender once. A contender taken out of the mapping stops taking part.

    The garbage collector runs before each turn's preparation and is off while the clock runs.
    """
    gc.collect()
    gc.freeze()  # what is there by now need not be looked through before every turn (0.2 s each)
    try:
        for number in tracked(range(rounds), description):
            for name in order(list(contenders), number):
                yield take_turn(number, name, contenders[name], device)
    finally:
        gc.unfreeze()


def take_turn(number: int, name: str, contender: Contender, device: torch.device) -> Turn:
    gc.collect()
    prepared = contender.prepare(number)
    gc.disable()
    try:
        synchronize(device)
        start = time.perf_counter()
        result = contender.run(prepared)
        synchronize(device)
        return Turn(number, name, time.perf_counter() - start, result)
    finally:
        gc.enable()


def order(names: list[str], number: int) -> list[str]:
    """The sequence of round `number`: for two, alternating; for 2n, Williams' square.

    In 2n rounds everyone stands once in each place and follows every other exactly once, so that
    caches left behind by a neighbour even out.
    """
    count = len(names)
    first = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    return [names[(index + number) % count] for index in first]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
