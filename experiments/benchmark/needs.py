"""What a strategy is expected to take, once: for sharing out the seconds, and for nothing else.

Ours takes a few times its floor (`floors.py`); how many is a property of the method more than of
the machine. LoftQ quantises, which the floor counts as passes over memory, and EVA's floor is that
of distinct inputs. To this come torch.linalg's computation, where it takes part, and a flat reserve
for copies, passes and judging. A need that is wrong by a factor costs turns elsewhere; no figure of
a row comes from here.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.benchmark.contenders import Request
from experiments.benchmark.floors import floor
from experiments.benchmark.provisions import Provisions
from experiments.benchmark.rates import Rates
from experiments.benchmark.sampling import choose
from experiments.benchmark.settings import InitializationSettings

FLOORS = {"loftq": 110.0, "eva": 45.0}
USUAL_FLOORS = 9.0
OBSERVED = 2.0  # of a plain pass, where it collects second moments


def needs(
    requests: Sequence[Request],
    provisions: Provisions,
    rates: Rates,
    chosen: InitializationSettings,
) -> list[float]:
    """Seconds of each request; a computation that several ask for counts with the first."""
    found, counted = [], set()
    for request in requests:
        targets, strategy = provisions.plan(request).targets, request.strategy
        shapes = [target.shape for target in targets]
        multiple = FLOORS.get(request.method, USUAL_FLOORS)
        seconds = chosen.reserve + multiple * floor(request.method, shapes, request.rank, rates)
        if strategy.calibration == "inputs":
            seconds += OBSERVED * sum(provisions.plain_seconds)
        wanted = provisions.subject.settings.exact
        if strategy.exact not in counted and (wanted is None or request.method in wanted):
            counted.add(strategy.exact)
            if strategy.exact is not None:
                sample = choose(strategy.exact, targets, shapes, rates, chosen.exact_limit)
                seconds += min(sample.needed, chosen.peer_limit)
        found.append(seconds)
    return found
