"""Tests of the reproduction of Init[A] and Init[B]: training, rates and every verdict."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.errors import ConfigurationError, RunFailed
from experiments.papers import rate_scaling as page
from experiments.papers import rate_scaling_rows as rows
from experiments.papers.claim import Verdict
from experiments.papers.rate_scaling_rows import NETWORKS, STARTS

HOLDS, DIRECTION = Verdict.REPRODUCED, Verdict.SAME_DIRECTION
NOT, CONTRADICTS = Verdict.NOT_REPRODUCED, Verdict.CONTRADICTS


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("start", STARTS)
def test_each_rate_is_trained_as_by_torch_adam(monkeypatch, network, start):
    task = rows.draw_task(network, 12, 0, out=3, inputs=5, examples=7, teacher_rank=2)
    lora_A, lora_B = rows.draw_start(start, task, 4, 0)
    assert not (lora_B if start == "A" else lora_A).any()
    rates = torch.tensor([1e-3, 1e-2, 0.1])
    monkeypatch.setattr(rows, "BLOCK", 2 * task.frozen.numel())  # blocks of two rates and of one
    found = rows.descend(task, lora_A, lora_B, rates, steps=6)
    inputs, frozen = task.inputs.double(), task.frozen.double()
    for place, rate in enumerate(rates.tolist()):
        A, B = torch.nn.Parameter(lora_A.double()), torch.nn.Parameter(lora_B.double())
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
        projected = (inputs @ A.T).square().mean().sqrt().item()
        features = (inputs @ (B @ A).T).square().mean().sqrt().item()
        assert found.projected[place].item() == pytest.approx(projected, rel=2e-3)
        assert found.features[place].item() == pytest.approx(features, rel=2e-3)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_has_size_one_at_any_width(network):
    for width in (64, 1024):
        task = rows.draw_task(network, width, 1, out=8, inputs=16, examples=64, teacher_rank=4)
        assert task.frozen.shape == (64, width if network == "square" else 8)
        for values in (task.inputs, task.frozen):
            assert values.square().mean().item() == pytest.approx(1, abs=0.5)


def test_the_best_rate_is_the_vertex_of_a_parabola():
    rates = np.geomspace(1e-3, 1, 10)
    final = np.exp(3 * (np.log(rates) - math.log(0.042)) ** 2 - 2)
    assert rows.best_rate(rates, final).value == pytest.approx(0.042)
    final[rows.best_rate(rates, final).index + 1 :] = np.inf
    assert rows.best_rate(rates, final).value in rates
    assert rows.best_rate(rates, np.arange(10) + 1.0).at_edge


def test_the_largest_stable_rate_is_interpolated_on_the_grid():
    rates = np.geomspace(1e-3, 1, 10)
    peaks = np.maximum(1.0, 2 * (rates / 0.03) ** 1.7)
    place = int((rates < 0.03).sum()) - 1
    peaks[place:] = 2 * (rates[place:] / 0.03) ** 1.7
    assert rows.largest_stable_rate(rates, peaks).value == pytest.approx(0.03)
    peaks[2] = np.inf  # a smaller rate that diverged ends the search
    assert rows.largest_stable_rate(rates, peaks).value == pytest.approx(rates[1])
    assert rows.largest_stable_rate(rates, np.ones(10)).at_edge
    assert rows.largest_stable_rate(rates, np.full(10, 5.0)).at_edge


def test_a_loss_that_diverged_is_infinite():
    losses = torch.tensor([[2.0, 2.0], [1.0, math.inf], [0.5, math.nan]])
    assert rows.final_losses(losses).tolist() == [0.25, math.inf]
    assert rows.peak_losses(losses).tolist() == [1.0, math.inf]


def trainings(first: float, second: float, growth=(0.5, 0.0)) -> pd.DataFrame:
    """Rates with these exponents for Init[A] and Init[B], and a ripple over the seeds."""
    powers, growths = {"A": first, "B": second}, dict(zip("AB", growth, strict=True))
    return pd.DataFrame(
        {
            "network": network,
            "start": start,
            "width": width,
            "seed": seed,
            "best": rate,
            "stable": rate,
            "projected": width ** growths[start] * ripple,
            "features": ripple,
        }
        for network, start, width, (seed, ripple) in product(
            NETWORKS, STARTS, (64, 256, 1024, 4096), enumerate((0.98, 1.02))
        )
        for rate in [(4 if start == "A" else 1) * width ** powers[start] * ripple]
    )


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [(-0.5, -1.0, HOLDS), (-0.7, -0.8, DIRECTION), (-0.8, -0.6, NOT), (0.2, 0.2, CONTRADICTS)],
)
def test_verdicts_on_the_laws(first, second, verdict):
    exponents = page.fit_all(trainings(first, second))
    assert exponents["square", "A", "best"].value == pytest.approx(first, abs=0.02)
    for network, start in product(NETWORKS, STARTS):
        assert page.scaling_claim(exponents, network, start).verdict == verdict


@pytest.mark.parametrize(
    ("first", "factor", "verdict"),
    [(-0.5, 1, HOLDS), (-0.5, 1 / 50, DIRECTION), (-1.0, 1, NOT), (-1.5, 1, CONTRADICTS)],
)
def test_verdict_on_the_larger_rate(first, factor, verdict):
    made = trainings(first, -1.0)
    some = made["start"] == "A"
    made.loc[some, "stable"] *= factor
    # Without noise an exponent of zero would have an interval of length 0.
    noisy = some & made["width"].isin([64, 4096]) & (made["seed"] == 0)
    made.loc[noisy, "stable"] *= 1.05
    assert page.tolerance_claim(made).verdict == verdict


@pytest.mark.parametrize(
    ("growth", "verdict"),
    [
        ((0.5, 0.0), HOLDS),
        ((0.5, 0.3), DIRECTION),
        ((0.5, -0.3), DIRECTION),
        ((0.0, 0.3), CONTRADICTS),
    ],
)
def test_verdict_on_the_inner_growth(growth, verdict):
    exponents = page.fit_all(trainings(-0.5, -0.5, growth))
    assert page.instability_claim(exponents).verdict == verdict


def test_a_wide_interval_does_not_count_as_bounded():
    made = trainings(-0.5, -0.5, (0.5, 0.4))
    noisy = (made["start"] == "B") & (made["width"] == 4096)
    made.loc[noisy, "projected"] *= 0.01
    made.loc[noisy & (made["seed"] == 0), "projected"] *= 1e5
    exponents = page.fit_all(made)
    assert exponents["square", "B", "projected"].low < 0.15
    assert page.instability_claim(exponents).verdict != HOLDS


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [((0.5, 0.6), HOLDS), ((0.5, 1.2), DIRECTION), ((0.9, 1.5), NOT), ((1.5, 1.6), CONTRADICTS)],
)
def test_verdict_on_the_loss(ratios, verdict):
    compared = pd.DataFrame(
        {
            "rank": rank,
            "start": start,
            "seed": seed,
            "width": 64,
            "loss": ratio * (1 + 0.01 * seed) if start == "A" else 1.0,
        }
        for rank, ratio in zip((2, 4), ratios, strict=True)
        for start in STARTS
        for seed in range(3)
    )
    assert page.loss_claim(compared).verdict == verdict


def test_a_grid_that_is_too_short_is_named(composed_paper):
    options = composed_paper("rate_scaling", "smoke", "lowest_rate=1e-6", "highest_rate=1e-5")
    with pytest.raises(RunFailed, match=r"best rate of Init\[A\], square network of width 32"):
        page.measure(options)


@pytest.mark.parametrize(
    "override", ["widths=[64,128]", "out=9", "steps=0", "compared_ranks=[0]", "lowest_rate=1"]
)
def test_unsupported_options_are_refused(composed_paper, override):
    with pytest.raises(ConfigurationError, match=f"{override.split('=')[0]}=.*must be"):
        composed_paper("rate_scaling", "fast", override)
