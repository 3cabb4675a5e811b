"""A part of `make fuzz`: no damage to a file hangs, crashes, or gives a wrong tensor."""

from __future__ import annotations

import pytest
from campaign import FAULTS, SUBJECTS, campaign, report

MUTATIONS = 40


@pytest.mark.parametrize("kind", SUBJECTS)
@pytest.mark.wrong_types
def test_damage_is_refused_or_harmless(kind):
    tallies = campaign([kind], MUTATIONS, processes=1, seconds=240)
    counts = tallies[kind].counts
    assert counts["mutations"] == MUTATIONS
    assert not any(counts[fault] for fault in FAULTS), "\n" + report(tallies)
    assert counts["refused"]
    assert counts["accepted and equal"]


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("adapter", 1310),  # our header is gone: PEFT's file, of twice the rank
        ("adapter with a quantized base", 188),  # the module name "("
        ("finished run", 82),  # half of a surrogate pair
        ("finished run", 359),
    ],
)
@pytest.mark.wrong_types
def test_what_a_campaign_found(kind, number):
    tallies = campaign([kind], 1, processes=1, seconds=240, only=number)
    assert not tallies[kind].faults
