"""rsLoRA's claim: gradients and losses against a training by hand, verdicts on made-up rows."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from experiments.errors import ConfigurationError
from experiments.papers import rank_scaling
from experiments.papers.corpus import joined_blocks, load_texts
from experiments.papers.subject import load_subject
from experiments.papers.claim import Verdict
from lora_init import LoraConfig, get_peft_model


@pytest.fixture(scope="module")
def subject():
    return load_subject("smollm2")


@pytest.mark.exhaustive
def test_norms_and_losses_are_those_of_a_plain_backward_pass(subject, smoke, composed_paper):
    """A training by hand, on the one block that the smoke form adapts."""
    settings = composed_paper("rank_scaling", "smoke")
    blocks = joined_blocks(subject.tokenizer, load_texts("plots"), length=16, tokens=32)
    others = joined_blocks(
        subject.tokenizer, load_texts("plots", "validation"), length=16, tokens=32
    )
    order = torch.randperm(2, generator=torch.Generator().manual_seed(settings.seed))
    block = f"model.layers.{settings.every // 2}"
    names = [f"{block}.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")]
    config = LoraConfig(r=4, lora_alpha=16, target_modules=names)
    model = get_peft_model(subject.model, config, cache=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    norms = []
    for place in order:
        some = blocks[place : place + 1]
        optimizer.zero_grad()
        model(input_ids=some, labels=some).loss.backward()
        squares = [p.grad.double().square().sum() for p in trained]
        norms.append(float(torch.stack(squares).sum().sqrt()))
        optimizer.step()
    with torch.no_grad():
        loss = float(model(input_ids=others, labels=others).loss)
    model.unload()
    findings = smoke("rank_scaling")
    rows = findings.tables[0].frame
    found = rows[(rows["scaling"] == "alpha / r") & (rows["rank"] == 4)]
    assert found["norm, first step"].item() == pytest.approx(norms[0], rel=1e-4)
    assert found["norm, later steps"].item() == pytest.approx(norms[1], rel=1e-3)
    assert found["loss, other films"].item() == pytest.approx(loss, rel=1e-4)
    assert "(3 layers)" in findings.setting["adapter"]


def steps(exponents: dict[str, float]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "scaling": scaling,
            "rank": rank,
            "step": step,
            "norm": 3 * rank ** exponents[scaling] * (1 + 0.01 * (rank == 8)),
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
        (0.3, -0.5, [Verdict.CONTRADICTS, Verdict.CONTRADICTS]),
        (0.0, 0.252, [Verdict.NOT_REPRODUCED, Verdict.NOT_REPRODUCED]),
    ],
)
def test_verdicts_follow_the_exponents(plain, stable, verdicts):
    made = steps({"alpha / r": plain, "alpha / √r": stable})
    fits = {flag: rank_scaling.fitted(made, flag) for flag in rank_scaling.SCALINGS}
    for fit in fits[False]:
        assert fit.exponent == pytest.approx(plain, abs=0.01)
    found = [rank_scaling.claim(flag, *fits[flag]) for flag in rank_scaling.SCALINGS]
    assert [claim.verdict for claim in found] == verdicts
    for claim in found:
        assert "contradicts: " in claim.criterion
    told = " ".join(rank_scaling.discussion(fits))
    assert ("the same." in told) == (verdicts == [Verdict.REPRODUCED] * 2)
    assert ("step sizes" in told) == (plain < 0)


def learned(plain: float, stable: float, noise: float) -> pd.DataFrame:
    """Losses on four blocks, of very different difficulty, at the smallest and the largest rank."""
    columns = {}
    for name, gain in (("alpha / r", plain), ("alpha / √r", stable)):
        blocks = pd.Series([2.0, 3.0, 4.0, 5.0])
        columns[name, 64] = blocks - gain - noise * pd.Series([1, -1, 1, -1])
        columns[name, 4] = blocks
    return pd.DataFrame(columns)


@pytest.mark.parametrize(
    ("plain", "stable", "noise", "verdict"),
    [
        (0.0, 0.3, 0.001, Verdict.REPRODUCED),
        (-0.05, 0.3, 0.001, Verdict.REPRODUCED),
        (0.2, 0.3, 0.001, Verdict.SAME_DIRECTION),
        (-0.2, 0.3, 0.001, Verdict.SAME_DIRECTION),  # a higher rank does harm under alpha / r
        (0.0, 0.004, 0.001, Verdict.SAME_DIRECTION),  # less than what counts as learned
        (0.0, 0.3, 1.0, Verdict.NOT_REPRODUCED),  # within the noise of the blocks
        (0.1, -0.3, 0.001, Verdict.CONTRADICTS),
        (0.4, 0.3, 0.001, Verdict.CONTRADICTS),
    ],
)
def test_verdict_on_the_loss(plain, stable, noise, verdict):
    made = learned(plain, stable, noise)
    made["alpha / r", 64] += 0.0002 * pd.Series([1, -1, -1, 1])  # so that differences vary
    claim = rank_scaling.loss_claim(made)
    assert claim.verdict is verdict
    assert f"{stable:+.4f} [" in claim.ours
    assert "contradicts: " in claim.criterion


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ranks=[2,4,1000]", r"ranks=\[2, 4, 1000\]: rank 1000 exceeds.*up_proj; .* from 1 to 576"),
        ("target_modules=[v_prjo]", r"target_modules=\['v_prjo'\]: no linear layer of smollm2"),
        ("every=100", "every=100: smollm2 has too few blocks"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused_by_name(
    subject, composed_paper, override, message
):
    settings = composed_paper("rank_scaling", "smoke", override)
    with pytest.raises(ConfigurationError, match=message):
        rank_scaling.targets(subject, settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ranks=[8,16]", r"ranks=\[8, 16\]; allowed are three or more"),
        ("held_out=1", "held_out=1; allowed are integers >= 2"),
        ("steps=1", "steps=1; allowed are integers >= 2"),
    ],
)
def test_bad_settings_are_refused_by_name(composed_paper, override, message):
    with pytest.raises(ConfigurationError, match=message):
        composed_paper("rank_scaling", "fast", override)
