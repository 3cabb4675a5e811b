"""Init[A] and Init[B]: trainings against torch's own Adam, rates against curves in closed form."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.errors import ConfigurationError, RunFailed
from experiments.papers.claim import Verdict
from experiments.papers.rate_scaling import descent, scaling
from experiments.papers.rate_scaling.claims import (
    discussion,
    instability_claim,
    loss_claim,
    scaling_claim,
    tolerance_claim,
)
from experiments.papers.rate_scaling.networks import NETWORKS, STARTS, draw_start, draw_task
from experiments.papers.rate_scaling.rates import (
    best_rate,
    final_losses,
    largest_stable_rate,
    peak_losses,
)

SHAPE = {"out": 3, "inputs": 5, "examples": 7, "teacher_rank": 2}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("start", STARTS)
def test_each_rate_is_trained_as_by_torch_adam(monkeypatch, network, start):
    task = draw_task(network, 12, 0, **SHAPE)
    lora_A, lora_B = draw_start(start, task, 4, 0)
    rates = torch.tensor([1e-3, 1e-2, 0.1])
    monkeypatch.setattr(descent, "BLOCK", 2 * task.frozen.numel())  # two blocks: 2 rates, and 1
    found = descent.descend(task, lora_A, lora_B, rates, steps=6)
    inputs, frozen = task.inputs.double(), task.frozen.double()
    for place, rate in enumerate(rates.tolist()):
        A = torch.nn.Parameter(lora_A.double())
        B = torch.nn.Parameter(lora_B.double())
        optimizer = torch.optim.Adam([A, B], lr=rate)
        losses = []
        for step in range(7):
            hidden = frozen + inputs @ (B @ A).T
            outputs = math.sqrt(2) * hidden.clamp(min=0) @ task.readout.double()
            loss = torch.nn.functional.mse_loss(outputs, task.targets.double())
            losses.append(loss.item())
            if step < 6:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert found.losses[:, place].tolist() == pytest.approx(losses, rel=2e-3)
        projected = (inputs @ A.T).square().mean().sqrt()
        features = (inputs @ (B @ A).T).square().mean().sqrt()
        assert found.projected[place].item() == pytest.approx(projected.item(), rel=2e-3)
        assert found.features[place].item() == pytest.approx(features.item(), rel=2e-3)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_is_of_size_one_at_any_width(network):
    for width in (64, 1024):
        task = draw_task(network, width, 1, out=8, inputs=16, examples=64, teacher_rank=4)
        assert task.frozen.shape == (64, width if network == "square" else 8)
        for values in (task.inputs, task.frozen):
            assert values.square().mean().item() == pytest.approx(1, abs=0.5)
        assert task.readout.square().sum().item() == pytest.approx(1, abs=0.9)


def test_the_starts_are_one_random_factor_and_one_of_zeros():
    task = draw_task("narrow", 400, 0, out=50, inputs=5, examples=7, teacher_rank=2)
    lora_A, lora_B = draw_start("A", task, 16, 0)
    assert not lora_B.any()
    assert lora_A.square().mean().item() == pytest.approx(1 / (3 * 400), rel=0.05)
    lora_A, lora_B = draw_start("B", task, 16, 0)
    assert not lora_A.any()
    assert lora_B.square().mean().item() == pytest.approx(1 / (3 * 16), rel=0.1)


def test_the_best_rate_is_the_vertex_of_a_parabola():
    rates = np.geomspace(1e-3, 1, 10)
    final = np.exp(3 * (np.log(rates) - math.log(0.042)) ** 2 - 2)
    assert best_rate(rates, final).value == pytest.approx(0.042)
    final[best_rate(rates, final).index + 1 :] = np.inf
    assert best_rate(rates, final).value in rates
    assert best_rate(rates, np.arange(10) + 1.0).at_edge


def test_the_largest_stable_rate_lies_between_rates_of_the_grid():
    rates = np.geomspace(1e-3, 1, 10)
    peaks = np.maximum(1.0, 2 * (rates / 0.03) ** 1.7)
    peaks[rates > 0.03] = 2 * (rates[rates > 0.03] / 0.03) ** 1.7
    below = rates[rates < 0.03].max()
    peaks[rates == below] = 2 * (below / 0.03) ** 1.7
    assert largest_stable_rate(rates, peaks).value == pytest.approx(0.03)
    peaks[2] = np.inf  # a smaller rate that diverged ends it
    found = largest_stable_rate(rates, peaks)
    assert (found.value, found.at_edge) == (pytest.approx(rates[1]), False)
    assert largest_stable_rate(rates, np.ones(10)).at_edge
    assert largest_stable_rate(rates, np.full(10, 5.0)).at_edge


def test_what_diverged_is_infinite():
    losses = torch.tensor([[2.0, 2.0], [1.0, math.inf], [0.5, math.nan]])
    assert final_losses(losses).tolist() == [0.25, math.inf]
    assert peak_losses(losses).tolist() == [1.0, math.inf]


def made(powers: dict[tuple[str, str], float], projected: dict[str, float]) -> pd.DataFrame:
    """Rates that follow laws, up to a ripple over the seeds; Init[A]'s are four times as large."""
    return pd.DataFrame(
        {
            "network": network,
            "start": start,
            "width": width,
            "seed": seed,
            "best": rate,
            "stable": rate,
            "projected": width ** projected[start] * ripple,
            "features": ripple,
        }
        for network, start, width, (seed, ripple) in product(
            NETWORKS, STARTS, (64, 256, 1024, 4096), enumerate((0.98, 1.02))
        )
        for rate in [(4 if start == "A" else 1) * width ** powers[network, start] * ripple]
    )


@pytest.mark.parametrize(
    ("first", "second", "verdicts"),
    [
        (-0.5, -1.0, [Verdict.REPRODUCED, Verdict.REPRODUCED]),
        (-0.7, -0.8, [Verdict.SAME_DIRECTION, Verdict.SAME_DIRECTION]),
        (-0.8, -0.6, [Verdict.NOT_REPRODUCED, Verdict.NOT_REPRODUCED]),
        (0.2, 0.2, [Verdict.CONTRADICTS, Verdict.CONTRADICTS]),
    ],
)
def test_verdicts_follow_the_exponents(first, second, verdicts):
    powers = {(n, s): first if s == "A" else second for n in NETWORKS for s in STARTS}
    exponents = scaling.fitted(made(powers, {"A": 0.5, "B": 0.0}))
    assert exponents["square", "A", "best"].exponent == pytest.approx(first, abs=0.02)
    for network in NETWORKS:
        found = [scaling_claim(exponents, network, start).verdict for start in STARTS]
        assert found == verdicts
        assert "contradicts: " in scaling_claim(exponents, network, "A").criterion


@pytest.mark.parametrize(
    ("first", "verdict"),
    [
        (-0.5, Verdict.REPRODUCED),
        (-1.0, Verdict.NOT_REPRODUCED),
        (-1.5, Verdict.CONTRADICTS),
    ],
)
def test_verdict_on_the_larger_rate(first, verdict):
    powers = {(n, s): first if s == "A" else -1.0 for n in NETWORKS for s in STARTS}
    trainings = made(powers, {"A": 0.5, "B": 0.0})
    # Networks differ: without noise an exponent of zero would have no interval around it.
    noisy = (trainings["start"] == "A") & (trainings["width"].isin([64, 4096]))
    trainings.loc[noisy & (trainings["seed"] == 0), "stable"] *= 1.05
    assert tolerance_claim(trainings).verdict is verdict
    assert "contradicts: " in tolerance_claim(trainings).criterion


def test_a_ratio_below_one_somewhere_is_the_same_direction():
    powers = {(n, s): -0.5 if s == "A" else -1.0 for n in NETWORKS for s in STARTS}
    trainings = made(powers, {"A": 0.5, "B": 0.0})
    trainings.loc[trainings["start"] == "A", "stable"] /= 50
    assert tolerance_claim(trainings).verdict is Verdict.SAME_DIRECTION


@pytest.mark.parametrize(
    ("projected", "verdict"),
    [
        ({"A": 0.5, "B": 0.0}, Verdict.REPRODUCED),
        ({"A": 0.5, "B": 0.3}, Verdict.SAME_DIRECTION),
        ({"A": 0.5, "B": -0.3}, Verdict.SAME_DIRECTION),
        ({"A": 0.0, "B": 0.3}, Verdict.CONTRADICTS),
    ],
)
def test_verdict_on_the_inner_growth(projected, verdict):
    powers = {(n, s): -0.5 for n in NETWORKS for s in STARTS}
    claim = instability_claim(scaling.fitted(made(powers, projected)))
    assert claim.verdict is verdict
    assert "contradicts: " in claim.criterion


def test_a_wide_interval_makes_no_growth_bounded():
    """Init[B]'s A h grows as n^0.4 on average: that its interval reaches 0 excuses nothing."""
    powers = {(n, s): -0.5 for n in NETWORKS for s in STARTS}
    trainings = made(powers, {"A": 0.5, "B": 0.4})
    noisy = (trainings["start"] == "B") & (trainings["width"] == 4096)
    trainings.loc[noisy, "projected"] *= 0.01
    trainings.loc[noisy & (trainings["seed"] == 0), "projected"] *= 1e5
    exponents = scaling.fitted(trainings)
    assert exponents["square", "B", "projected"].low < 0.15
    assert exponents["square", "B", "projected"].exponent > 0.15
    assert instability_claim(exponents).verdict is not Verdict.REPRODUCED


def test_the_discussion_follows_the_figures():
    powers = {(n, s): -0.5 if s == "A" else -1.0 for n in NETWORKS for s in STARTS}
    trainings = made(powers, {"A": 0.5, "B": 0.0})
    told = " ".join(discussion(trainings, scaling.fitted(trainings)))
    assert told.count("both laws are found") == 2
    assert "above Init[B]’s at 4 of 4 widths." in told
    assert "too large for a wide one" in told
    assert "signs there" not in told
    powers = {(n, s): -0.75 if s == "A" else 0.1 for n in NETWORKS for s in STARTS}
    trainings = made(powers, {"A": 0.5, "B": 0.0})
    trainings.loc[trainings["start"] == "A", "stable"] /= 50
    exponents = scaling.fitted(trainings)
    told = " ".join(discussion(trainings, exponents))
    assert told.count("neither law is found") == 2
    assert "at 0 of 4 widths; not at n = 64 (" in told
    assert "too large for a wide one" not in told
    assert "signs there" in told
    assert "(measured: n^0.50)" in scaling_claim(exponents, "square", "A").remark
    assert not scaling_claim(exponents, "narrow", "A").remark


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ((0.5, 0.6), Verdict.REPRODUCED),
        ((0.5, 1.2), Verdict.SAME_DIRECTION),
        ((0.9, 1.5), Verdict.NOT_REPRODUCED),
        ((1.5, 1.6), Verdict.CONTRADICTS),
    ],
)
def test_verdict_on_the_loss(ratios, verdict):
    compared = pd.DataFrame(
        {
            "rank": rank,
            "start": start,
            "seed": seed,
            "width": 64,
            "loss": (ratio if start == "A" else 1) * (1 + 0.01 * seed * (start == "A")),
        }
        for rank, ratio in zip((2, 4), ratios, strict=True)
        for start in STARTS
        for seed in range(3)
    )
    assert loss_claim(compared).verdict is verdict
    assert "contradicts: " in loss_claim(compared).criterion


def test_a_grid_that_ends_too_early_is_named(composed_paper):
    settings = composed_paper("rate_scaling", "smoke", "lowest_rate=1e-6", "highest_rate=1e-5")
    with pytest.raises(
        RunFailed, match=r"best rate of Init\[A\], square network of width 32.*1e-06"
    ):
        scaling.reproduce(settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("widths=[64,128]", r"widths=\[64, 128\]; allowed are three or more"),
        ("out=9", "out=9; allowed are integers from 1 to rank=8"),
        ("steps=0", "steps=0; allowed are integers >= 1"),
        ("compared_ranks=[0]", r"compared_ranks=\[0\]; allowed are ranks from 1"),
        ("lowest_rate=1", "lowest_rate=1.0, highest_rate=0.3; allowed are finite rates > 0"),
    ],
)
def test_bad_settings_are_refused_by_name(composed_paper, override, message):
    with pytest.raises(ConfigurationError, match=message):
        composed_paper("rate_scaling", "fast", override)
