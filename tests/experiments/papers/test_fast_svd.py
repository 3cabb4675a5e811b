"""Tests of the reproduction of PiSSA's fast SVD: errors, starts and every verdict."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from tiny_llama import tiny_llama

from experiments.errors import ConfigurationError
from experiments.papers import fast_svd
from experiments.papers import fast_svd_rows as rows
from experiments.papers.claim import Verdict
from experiments.papers.fast_svd_rows import LOWRANK, NITER, PISSA, FastSvdOptions
from experiments.papers.subject import Subject

HOLDS, DIRECTION = Verdict.REPRODUCED, Verdict.SAME_DIRECTION
NOT, CONTRADICTS = Verdict.NOT_REPRODUCED, Verdict.CONTRADICTS


def weight() -> torch.Tensor:
    return torch.randn(40, 60, generator=torch.Generator().manual_seed(0))


def test_errors_of_a_triplet_swapped_for_the_next_one():
    triplets = rows.full_svd(weight())
    chosen = [0, 1, 2, 3, 5]
    found = rows.balanced(
        -triplets.left[:, chosen], triplets.values[chosen], -triplets.right[:, chosen]
    )
    errors = rows.errors(found, triplets.leading(5), weight())
    s = triplets.values.double()
    kept, tail = s[:5].square().sum(), s[5:].square().sum()
    difference = ((s[4] ** 2 + s[5] ** 2) / kept).sqrt()
    excess = ((tail + s[4] ** 2 - s[5] ** 2) / tail).sqrt() - 1
    assert errors["difference"] == pytest.approx(float(difference), rel=1e-5)
    assert errors["excess"] == pytest.approx(float(excess), rel=1e-4)
    assert errors["overlap"] == pytest.approx(4 / 5, rel=1e-5)
    last = [
        torch.cat([triplets.right[:, i], triplets.left[:, i]]).double() * s[i].sqrt()
        for i in (4, 5)
    ]
    apart = last[0] - torch.sign(last[0] @ last[1]) * last[1]
    assert errors["entries"] == pytest.approx(float(apart.abs().sum() / 500), rel=1e-4)


@pytest.mark.parametrize("method", [LOWRANK, NITER, PISSA])
def test_every_method_finds_the_principal_part(method):
    left, values, right = torch.linalg.svd(weight().double(), full_matrices=False)
    best = (left[:, :4] * values[:4]) @ right[:4]
    state = torch.get_rng_state()
    lora_A, lora_B = rows.decompose(method, weight(), 4, 60, 3)
    assert torch.equal(torch.get_rng_state(), state), "the global generator has changed"
    product = lora_B.double() @ lora_A.double()
    assert float((product - best).norm() / best.norm()) < 0.02
    for gram in (lora_A @ lora_A.T, lora_B.T @ lora_B):
        torch.testing.assert_close(gram.diagonal().double(), values[:4], rtol=5e-3, atol=0)


@pytest.fixture
def small():
    subject = Subject("small", "", tiny_llama(), None)
    return subject, FastSvdOptions(share=1 / 8, synthetic=None, device="cpu", adapted_every=2)


@pytest.mark.parametrize("niter", [None, 1])
def test_a_start_adapts_the_chosen_blocks_and_keeps_the_outputs(small, niter):
    subject, options = small
    tokens = torch.arange(12)[None]
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    expected = subject.model(tokens).logits
    model = rows.start(subject, options, niter, seed=0)
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert len(trained) == 2 * 7
    assert all("layers.1." in name for name in trained)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    if niter is None:
        model.unload()
    for name, value in before.items():
        torch.testing.assert_close(subject.model.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_measured_rows_have_the_judged_rank_and_errors(small):
    subject, options = small
    options.ranks, options.niters, options.target_modules = [1], [1, 16], ["q_proj"]
    frame = rows.measure_decompositions(rows.matrices(subject, options), options)
    assert sorted(frame["rank"].unique()) == [1, 2]
    assert len(frame) == options.rounds * 2 * 5
    assert frame.loc[frame["method"] == PISSA, "excess"].abs().max() < 1e-5
    options.ranks = [200]
    with pytest.raises(ConfigurationError, match=r"ranks=\[200\].*q_proj, 16 × 16"):
        rows.matrices(subject, options)
    options.target_modules = ["nothing"]
    with pytest.raises(ConfigurationError, match=r"target_modules=\['nothing'\]"):
        rows.matrices(subject, options)


def decompositions(last: float, share: float, pissa: tuple[float, float]) -> pd.DataFrame:
    """Errors from 1 (niter 1) to `last` (niter 16), with one slow round in three."""
    errors = {(LOWRANK, 1): 1.0, (LOWRANK, 16): last, (NITER, 1): 0.5, (NITER, 16): last / 2}
    made = []
    for source in ("model", "synthetic"):
        for layer in ("a", "b"):
            for turn in range(3):
                case = {"source": source, "layer": layer, "round": turn, "judged": True}
                case |= {"rank": 8, "exact_seconds": 10.0, "overlap": 0.9}
                late = 100.0 if turn == 2 else 0.0
                for (method, niter), error in errors.items():
                    found = {"difference": 1 / niter**0.25, "excess": error, "entries": error}
                    seconds = 10 * share + late
                    made.append(
                        case | found | {"method": method, "niter": niter, "seconds": seconds}
                    )
                found = dict.fromkeys(["difference", "excess", "entries"], pissa[0])
                made.append(
                    case | found | {"method": PISSA, "niter": None, "seconds": 10 * pissa[1]}
                )
    return pd.DataFrame(made)


@pytest.mark.parametrize(
    ("last", "share", "pissa", "verdict"),
    [
        (0.2, 0.05, (0.1, 0.04), HOLDS),
        (0.4, 0.3, (0.1, 0.9), DIRECTION),
        (1.5, 2.0, (1.9, 0.1), CONTRADICTS),
    ],
)
def test_verdicts_on_decompositions(last, share, pissa, verdict):
    figures = fast_svd.summary(decompositions(last, share, pissa))
    for claim in (fast_svd.error_claim, fast_svd.time_claim, fast_svd.pissa_claim):
        assert claim(figures).verdict == verdict


def test_times_are_medians_and_rounding_is_no_error():
    figures = fast_svd.summary(decompositions(0.2, 0.05, (1e-9, 0.04)))
    assert fast_svd.curves(figures, LOWRANK, "seconds")["model"][16] == pytest.approx(1.0)
    assert fast_svd.curves(figures, LOWRANK, "share")["model"][16] == pytest.approx(0.05)
    assert "excess error below 1e-07 against 0.2" in fast_svd.pissa_claim(figures).ours


def ends(one: float, sixteen: float, scatter: float) -> fast_svd.Ends:
    """Losses above the exact start's on four blocks; those of niter 16 scatter."""
    steps, held_out = [], []
    for start, above, draws in (("exact", 0.0, 1), ("niter 1", one, 2), ("niter 16", sixteen, 2)):
        for draw in range(draws):
            case = {"start": start, "draw": draw}
            steps += [case | {"step": n, "loss": 4 + above if n == 4 else 50.0} for n in (1, 2, 4)]
            for block in range(4):
                apart = scatter * (-1) ** block if start == "niter 16" else 0.0
                drawn = 0.001 * (draw - 0.5) * (draws - 1)  # cancels in the mean over draws
                loss = 5 + block + above + apart + drawn
                held_out.append(case | {"block": block, "loss": loss})
    return fast_svd.Ends.of(pd.DataFrame(steps), pd.DataFrame(held_out))


@pytest.mark.parametrize(
    ("one", "sixteen", "scatter", "agreement", "cost"),
    [
        (0.04, 0.001, 0.0, HOLDS, HOLDS),
        (0.04, 0.001, 0.02, DIRECTION, HOLDS),
        (0.04, 0.018, 0.1, DIRECTION, DIRECTION),
        (0.04, 0.025, 0.05, NOT, DIRECTION),
        (0.04, 0.06, 0.0, CONTRADICTS, NOT),
        (-0.1, 0.1, 0.0, Verdict.NOT_JUDGED, CONTRADICTS),
    ],
)
def test_verdicts_on_training(one, sixteen, scatter, agreement, cost):
    found = ends(one, sixteen, scatter)
    assert fast_svd.agreement_claim(found).verdict == agreement
    assert fast_svd.cost_claim(found).verdict == cost
    assert found.by_start["niter 1"] - found.by_start["exact"] == pytest.approx(one)


@pytest.mark.parametrize(
    "override",
    ["niters=[1,4]", "starts=[16,1]", "draws=0", "steps=1", "share=0", "synthetic=8", "ranks=[0]"],
)
def test_unsupported_options_are_refused(composed_paper, override):
    with pytest.raises(ConfigurationError, match=f"{override.split('=')[0]}=.*must be"):
        composed_paper("fast_svd", "fast", override)
