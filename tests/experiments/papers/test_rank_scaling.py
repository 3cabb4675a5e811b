"""rsLoRA's claim: exponents against the algebra, on gradients taken by hand."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from experiments.errors import ConfigurationError
from experiments.papers import rank_scaling
from experiments.papers.subjects import load_subject
from experiments.papers.verdicts import Verdict
from lora_init import LoraConfig, get_peft_model


def test_the_first_norms_are_those_of_a_plain_backward_pass(smoke, composed_paper):
    settings = composed_paper("rank_scaling", "smoke")
    subject = load_subject(settings.model)
    from experiments.papers.corpora import joined_blocks, load_texts

    blocks = joined_blocks(subject.tokenizer, load_texts("plots"), length=16, tokens=32)
    order = torch.randperm(2, generator=torch.Generator().manual_seed(settings.seed))
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "o_proj", "up_proj"])
    model = get_peft_model(subject.model, config, cache=False)
    model(input_ids=blocks[order[:1]], labels=blocks[order[:1]]).loss.backward()
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    expected = float(torch.stack(squares).sum().sqrt())
    rows = smoke("rank_scaling").tables[0].frame
    found = rows[(rows["scaling"] == "alpha / r") & (rows["rank"] == 4)]
    assert found["norm, first step"].item() == pytest.approx(expected, rel=1e-4)


def steps(exponents: dict[str, float], gains: dict[str, float]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "scaling": scaling,
            "rank": rank,
            "step": step,
            "norm": 3 * rank ** exponents[scaling] * (1 + 0.01 * (rank == 8)),
            "loss": 4 - gains[scaling] * (rank == 64),
        }
        for scaling in rank_scaling.SCALINGS.values()
        for rank in (4, 8, 16, 32, 64)
        for step in (1, 2, 3)
    )


@pytest.mark.parametrize(
    ("plain", "stable", "verdicts"),
    [
        (-0.5, 0.0, [Verdict.REPRODUCED, Verdict.REPRODUCED]),
        (-0.2, 0.2, [Verdict.SAME_DIRECTION, Verdict.SAME_DIRECTION]),
        (0.3, -0.5, [Verdict.CONTRADICTS, Verdict.NOT_REPRODUCED]),
    ],
)
def test_verdicts_follow_the_exponents(plain, stable, verdicts):
    made = steps({"alpha / r": plain, "alpha / √r": stable}, {"alpha / r": 0, "alpha / √r": 1})
    fits = {flag: rank_scaling.fitted(made, flag) for flag in rank_scaling.SCALINGS}
    for fit in fits[False]:
        assert fit.exponent == pytest.approx(plain, abs=0.01)
    found = [rank_scaling.claim(flag, *fits[flag]).verdict for flag in rank_scaling.SCALINGS]
    assert found == verdicts


@pytest.mark.parametrize(
    ("plain", "stable", "verdict"),
    [
        (0.0, 0.3, Verdict.REPRODUCED),
        (0.2, 0.3, Verdict.SAME_DIRECTION),
        (0.1, -0.3, Verdict.CONTRADICTS),
    ],
)
def test_verdict_on_the_loss(plain, stable, verdict):
    gains = {"alpha / r": plain, "alpha / √r": stable}
    made = steps({"alpha / r": -0.5, "alpha / √r": 0.0}, gains)
    assert rank_scaling.loss_claim(made).verdict is verdict


def test_a_rank_above_a_layer_is_refused_by_name(composed_paper):
    settings = composed_paper("rank_scaling", "smoke", "ranks=[2,4,1000]")
    with pytest.raises(ConfigurationError, match=r"ranks=\[2, 4, 1000\].*rank 1000 exceeds"):
        rank_scaling.reproduce(settings)


def test_too_few_ranks_are_refused(composed_paper):
    with pytest.raises(ConfigurationError, match=r"ranks=\[8, 16\]; allowed are three or more"):
        composed_paper("rank_scaling", "fast", "ranks=[8,16]")
