"""The fast SVD of PiSSA: errors of known perturbations, starts of a small model, verdicts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_1samp
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.benchmark.powerlaw import PowerLaw
from experiments.errors import ConfigurationError
from experiments.papers.fast_svd import decomposing, judging, measuring, starts
from experiments.papers.fast_svd.decomposing import LOWRANK, NITER, PISSA, Pair, exact
from experiments.papers.fast_svd.errors import errors_of
from experiments.papers.fast_svd.settings import FastSvdSettings
from experiments.papers.subject import Subject
from experiments.papers.claim import Verdict

HOLDS, DIRECTION = Verdict.REPRODUCED, Verdict.SAME_DIRECTION
NOT, CONTRADICTS = Verdict.NOT_REPRODUCED, Verdict.CONTRADICTS


def weight(rows: int = 40, columns: int = 60) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_errors_of_a_triplet_that_was_swapped_for_the_next():
    matrix = weight()
    triplets, rank = exact(matrix), 5
    columns = [0, 1, 2, 3, 5]
    found = decomposing.paired(
        -triplets.left[:, columns], triplets.values[columns], -triplets.right[:, columns]
    )
    s = triplets.values.double()
    errors = errors_of(found, triplets.leading(rank), matrix)
    kept, tail = s[:rank].square().sum(), s[rank:].square().sum()
    difference = ((s[4] ** 2 + s[5] ** 2) / kept).sqrt()
    excess = ((tail + s[4] ** 2 - s[5] ** 2) / tail).sqrt() - 1
    assert errors.difference == pytest.approx(float(difference), rel=1e-5)
    assert errors.excess == pytest.approx(float(excess), rel=1e-4)
    assert errors.overlap == pytest.approx(4 / 5, rel=1e-5)
    ends = [
        torch.cat([triplets.right[:, i], triplets.left[:, i]]).double() * s[i].sqrt()
        for i in (4, 5)
    ]
    sign = torch.sign(ends[0] @ ends[1])
    expected = (ends[0] - sign * ends[1]).abs().sum() / (100 * rank)
    assert errors.entries == pytest.approx(float(expected), rel=1e-4)


def test_the_exact_factors_have_no_error():
    matrix = weight()
    best = exact(matrix).leading(7)
    errors = errors_of(Pair(-best.lora_A, -best.lora_B), best, matrix)
    assert errors.difference < 1e-6
    assert abs(errors.excess) < 1e-6
    assert errors.entries < 1e-6
    assert errors.overlap == pytest.approx(1)


@pytest.mark.parametrize("method", decomposing.CONTENDERS)
def test_every_contender_finds_the_principal_part(method):
    matrix = weight()
    expected = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = (expected[0][:, :4] * expected[1][:4]) @ expected[2][:4]
    state = torch.get_rng_state()
    pair = decomposing.CONTENDERS[method](matrix, 4, 60, 3)
    assert torch.equal(torch.get_rng_state(), state), "the global generator has moved"
    assert pair.lora_A.shape == (4, 60)
    product = pair.lora_B.double() @ pair.lora_A.double()
    assert float((product - best).norm() / best.norm()) < 0.02
    balance = pair.lora_A @ pair.lora_A.T, pair.lora_B.T @ pair.lora_B
    for gram in balance:
        torch.testing.assert_close(gram.diagonal().double(), expected[1][:4], rtol=5e-3, atol=0)


def test_lowrank_is_drawn_from_its_seed():
    first, again, other = (decomposing.by_lowrank(weight(), 4, 0, seed) for seed in (1, 1, 2))
    assert torch.equal(first.lora_A, again.lora_A)
    assert not torch.allclose(first.lora_A, other.lora_A)


@pytest.fixture
def small():
    """A Llama of two blocks as a subject, and settings that fit it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    subject = Subject("small", "", LlamaForCausalLM(config).eval(), None)
    return subject, FastSvdSettings(share=1 / 16, device="cpu")


@pytest.mark.parametrize("niter", [None, 1])
def test_a_start_computes_what_the_model_computes(small, niter):
    subject, settings = small
    tokens = torch.arange(12)[None]
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    expected = subject.model(tokens).logits
    if niter is None:
        started = starts.exact_start(subject, settings)
        layer = started.layers["model.layers.1.mlp.up_proj"]
        original = before["model.layers.1.mlp.up_proj.weight"].double()
        left, values, right = torch.linalg.svd(original, full_matrices=False)
        best = (left[:, :4] * values[:4]) @ right[:4]
        product = layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        assert float((product - best).norm() / best.norm()) < 1e-5
    else:
        started = starts.fast_start(subject, settings, niter, 0)
        trained = [name for name, p in started.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * 2 * 7
    torch.testing.assert_close(started(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    if niter is None:
        started.unload()
    after = subject.model.state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-6)


def test_draws_differ(small):
    subject, settings = small
    first, second = (starts.fast_start(subject, settings, 1, seed) for seed in (0, 1))
    one, other = (
        model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_A["default"]
        for model in (first, second)
    )
    assert not torch.allclose(one.weight, other.weight)


@pytest.mark.parametrize("niter", [None, 1])
def test_only_the_chosen_blocks_are_adapted(small, niter):
    subject, settings = small
    settings.adapted_every = 2
    assert starts.adapted(subject, settings) == [1]
    if niter is None:
        started = starts.exact_start(subject, settings)
        assert {name.split(".")[2] for name in started.layers} == {"1"}
        started.unload()
    else:
        started = starts.fast_start(subject, settings, niter, 0)
        names = [name for name, p in started.named_parameters() if p.requires_grad]
        assert len(names) == 2 * 7
        assert all(".layers.1." in name for name in names)


def rows(last: float, share: float, ours: tuple[float, float]) -> pd.DataFrame:
    """Two sources, two matrices each: errors from 1 (niter 1) to `last` (niter 16).

    Those of the product fall by 2 whatever `last` is: they are not what is judged.
    """
    errors = {(LOWRANK, 1): 1.0, (LOWRANK, 16): last, (NITER, 1): 0.5, (NITER, 16): last / 2}
    made = []
    for source in ("model", "synthetic"):
        for layer in ("a", "b"):
            for turn in range(3):
                shared = {"source": source, "layer": layer, "round": turn, "judged": True,
                          "rank": 8, "exact_seconds": 10.0, "overlap": 0.9}  # fmt: skip
                for (method, niter), error in errors.items():
                    late = 100.0 if turn == 2 else 0.0  # one slow round moves no median
                    made.append({**shared, "method": method, "niter": niter,
                                 "difference": 1 / niter**0.25, "excess": error,
                                 "entries": error, "seconds": 10 * share + late})  # fmt: skip
                made.append({**shared, "method": PISSA, "niter": None, "difference": ours[0],
                             "excess": ours[0], "entries": ours[0],
                             "seconds": 10 * ours[1]})  # fmt: skip
    return pd.DataFrame(made)


@pytest.mark.parametrize(
    ("made", "verdicts"),
    [
        (rows(0.2, 0.05, (0.1, 0.04)), [HOLDS, HOLDS, HOLDS]),
        (rows(0.4, 0.3, (0.1, 0.9)), [DIRECTION, DIRECTION, DIRECTION]),
        (rows(1.5, 2.0, (1.9, 0.1)), [CONTRADICTS, CONTRADICTS, CONTRADICTS]),
    ],
)
def test_verdicts_on_decompositions(made, verdicts):
    figures = judging.summary(made)
    found = [
        claim(figures).verdict
        for claim in (judging.error_claim, judging.time_claim, judging.pissa_claim)
    ]
    assert found == verdicts


def test_what_no_float32_resolves_is_told_so():
    figures = judging.summary(rows(0.2, 0.05, (1e-9, 0.04)))
    assert "excess error below 1e-07 against 0.2" in judging.pissa_claim(figures).ours
    assert (
        "1 → 0.2 (÷ 5.0), of s B A relatively 1 → 0.5 (÷ 2.0)" in judging.error_claim(figures).ours
    )
    own = [
        claim.published for claim in (judging.error_claim(figures), judging.pissa_claim(figures))
    ]
    assert own == [True, False]


def test_times_are_medians_summed_over_the_matrices():
    figures = judging.summary(rows(0.2, 0.05, (0.1, 0.04)))
    found = judging.curve(figures, "model", LOWRANK, "seconds")
    assert found[16] == pytest.approx(1.0)
    assert judging.curve(figures, "model", LOWRANK, "share")[16] == pytest.approx(0.05)


def training(one: float, sixteen: float, scatter: float = 0.0) -> starts.Training:
    """Losses above the exact start's, on four blocks: those of niter 16 by `scatter` apart."""
    steps, held_out = [], []
    for start, above, draws in (("exact", 0.0, 1), ("niter 1", one, 2), ("niter 16", sixteen, 2)):
        for draw in range(draws):
            run = {"start": start, "draw": draw}
            steps += [{**run, "step": step, "loss": 4 + above if step == 4 else 50.0}
                      for step in (1, 2, 3, 4)]  # fmt: skip
            for block in range(4):
                apart = scatter * (-1) ** block if start == "niter 16" else 0.0
                drawn = 0.001 * (draw - 0.5) * (draws - 1)  # cancels in the mean over draws
                held_out.append({**run, "block": block, "loss": 5 + block + above + apart + drawn})
    return starts.Training(pd.DataFrame(steps), pd.DataFrame(held_out))


@pytest.mark.parametrize(
    ("losses", "agreement", "cost"),
    [
        (training(0.04, 0.001), HOLDS, HOLDS),
        (training(0.04, 0.001, scatter=0.02), DIRECTION, HOLDS),
        (training(0.04, 0.015), DIRECTION, HOLDS),
        (training(0.04, 0.018, scatter=0.1), DIRECTION, DIRECTION),
        (training(0.04, 0.025, scatter=0.05), NOT, DIRECTION),
        (training(0.04, 0.06), CONTRADICTS, NOT),
        (training(-0.1, 0.1), Verdict.NOT_JUDGED, CONTRADICTS),
    ],
)
def test_verdicts_on_training(losses, agreement, cost):
    ends = judging.Ends.of(losses)
    assert judging.agreement_claim(ends).verdict is agreement
    assert judging.cost_claim(ends).verdict is cost


def test_ends_are_paired_over_unseen_blocks():
    ends = judging.Ends.of(training(0.04, 0.01, scatter=0.02))
    found = ends.above("niter 16")
    apart = np.array([0.03, -0.01, 0.03, -0.01])
    expected = ttest_1samp(apart, 0).confidence_interval(0.95)
    assert found.value == pytest.approx(0.01)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert ends.by_start["niter 1"] - ends.by_start["exact"] == pytest.approx(0.04)
    assert "by draw +0.0395, +0.0405" in ends.told("niter 1")


def test_measured_errors_are_those_of_a_dense_computation():
    matrix = PowerLaw(128, 128, "fast_svd", 0).weight()
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = (left[:, :4] * values[:4]) @ right[:4]
    torch.manual_seed(5)
    u, s, v = torch.svd_lowrank(matrix, 4, niter=1)
    product = (u.double() * s.double()) @ v.double().T
    settings = FastSvdSettings(ranks=[2], niters=[1, 16], seed=3)
    made = measuring.rows_of(measuring.Matrix("synthetic", "synthetic", matrix, 4), 2, settings)
    frame = pd.DataFrame(made)
    assert sorted(frame["rank"].unique()) == [2, 4]
    found = frame[frame["judged"] & (frame["method"] == LOWRANK) & (frame["niter"] == 1)]
    expected = float((product - best).norm() / best.norm())
    assert found["difference"].item() == pytest.approx(expected, rel=1e-3)
    assert found["exact_seconds"].item() > 0


def test_a_rank_above_a_matrix_is_refused_by_name(small):
    subject, settings = small
    settings.ranks = [200]
    with pytest.raises(ConfigurationError, match=r"rank 200 exceeds \S+q_proj, 64 × 64"):
        measuring.matrices(subject, settings)
    settings.target_modules = ["nothing"]
    with pytest.raises(ConfigurationError, match=r"target_modules=\['nothing'\].*no such layers"):
        measuring.matrices(subject, settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("niters=[1,4]", r"niters=\[1, 4\]; .* 1 and 16 among them"),
        ("starts=[16,1]", r"starts=\[16, 1\]; allowed are ascending"),
        ("draws=0", "draws=0; allowed are integers >= 1"),
        ("adapted_every=0", "adapted_every=0; allowed are integers >= 1"),
        ("steps=1", "steps=1; allowed are integers >= 2"),
        ("share=0", r"share=0\S*; allowed are shares"),
        ("synthetic=8", "synthetic=8; allowed are integers >= 64"),
        ("ranks=[0]", r"ranks=\[0\]; allowed are ranks >= 1"),
        ("blocks=0", "blocks=0; allowed are integers >= 1"),
    ],
)
def test_bad_settings_are_refused(composed_paper, override, message):
    with pytest.raises(ConfigurationError, match=message):
        composed_paper("fast_svd", "fast", override)
