"""Tests of the reproduction of rsLoRA: training against a plain loop, and every verdict."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from experiments.errors import ConfigurationError
from experiments.papers import rank_scaling
from experiments.papers.claim import Verdict
from experiments.papers.corpus import joined_blocks, load_texts
from experiments.papers.subject import load_subject
from lora_init import LoraConfig, get_peft_model


@pytest.fixture(scope="module")
def subject():
    return load_subject("smollm2")


@pytest.mark.exhaustive
def test_norms_and_losses_equal_a_plain_training_loop(subject, smoke, composed_paper):
    options = composed_paper("rank_scaling", "smoke")
    blocks, others = (
        joined_blocks(subject.tokenizer, load_texts("plots", split), length=16, tokens=32)
        for split in ("train", "validation")
    )
    order = torch.randperm(2, generator=torch.Generator().manual_seed(options.seed))
    block = f"model.layers.{options.every // 2}"
    names = [f"{block}.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")]
    config = LoraConfig(r=4, lora_alpha=16, target_modules=names)
    model = get_peft_model(subject.model, config, cache=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
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
    assert "3 layers" in findings.setting["model"]


def steps(plain: float, stable: float) -> pd.DataFrame:
    """Norms that follow one power law for each scaling."""
    return pd.DataFrame(
        {
            "scaling": scaling,
            "rank": rank,
            "step": step,
            "norm": 3 * rank**exponent * (1 + 0.01 * (rank == 8)),
        }
        for scaling, exponent in zip(rank_scaling.SCALINGS.values(), (plain, stable), strict=True)
        for rank in (4, 8, 16, 32, 64)
        for step in (1, 2, 3)
    )


def losses(plain: float, stable: float, noise: float) -> pd.DataFrame:
    """Losses on four blocks of different difficulty, at the smallest and the largest rank."""
    columns = {}
    blocks, signs = pd.Series([2.0, 3.0, 4.0, 5.0]), pd.Series([1, -1, 1, -1])
    for name, gain in (("alpha / r", plain), ("alpha / √r", stable)):
        columns[name, 64] = blocks - gain - noise * signs
        columns[name, 4] = blocks
    columns["alpha / r", 64] += 0.0002 * pd.Series([1, -1, -1, 1])  # so that differences vary
    return pd.DataFrame(columns)


@pytest.mark.parametrize(
    ("plain", "stable", "verdict"),
    [
        (-0.5, 0.0, Verdict.REPRODUCED),
        (-0.2, 0.2, Verdict.SAME_DIRECTION),
        (0.3, -0.5, Verdict.CONTRADICTS),
        (0.0, 0.252, Verdict.NOT_REPRODUCED),
    ],
)
def test_verdicts_on_norms(plain, stable, verdict):
    made = steps(plain, stable)
    fits = {flag: rank_scaling.fit_norms(made, flag) for flag in rank_scaling.SCALINGS}
    assert [fit.value for fit in fits[False]] == pytest.approx([plain] * 2, abs=0.01)
    for flag in rank_scaling.SCALINGS:
        claim = rank_scaling.norm_claim(flag, *fits[flag])
        assert claim.verdict == verdict
        assert "contradicts: " in claim.criterion


@pytest.mark.parametrize(
    ("plain", "stable", "noise", "verdict"),
    [
        (0.0, 0.3, 0.001, Verdict.REPRODUCED),
        (-0.05, 0.3, 0.001, Verdict.REPRODUCED),
        (0.2, 0.3, 0.001, Verdict.SAME_DIRECTION),
        (-0.2, 0.3, 0.001, Verdict.SAME_DIRECTION),  # a higher rank does harm under alpha / r
        (0.0, 0.004, 0.001, Verdict.SAME_DIRECTION),  # below the smallest gain that counts
        (0.0, 0.3, 1.0, Verdict.NOT_REPRODUCED),  # within the noise of the blocks
        (0.1, -0.3, 0.001, Verdict.CONTRADICTS),
        (0.4, 0.3, 0.001, Verdict.CONTRADICTS),
    ],
)
def test_verdict_on_losses(plain, stable, noise, verdict):
    claim = rank_scaling.loss_claim(losses(plain, stable, noise))
    assert claim.verdict == verdict
    assert f"{stable:+.4f} [" in claim.ours


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ranks=[2,4,1000]", r"ranks=\[2, 4, 1000\].*must be from 1 to 576, .*up_proj"),
        ("target_modules=[v_prjo]", r"target_modules=\['v_prjo'\].*linear layers in smollm2"),
        ("every=100", "every=100 .*smollm2 has too few blocks"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused(subject, composed_paper, override, message):
    with pytest.raises(ConfigurationError, match=message):
        rank_scaling.targets(subject, composed_paper("rank_scaling", "smoke", override))


@pytest.mark.parametrize("override", ["ranks=[8,16]", "held_out=1", "steps=1"])
def test_unsupported_options_are_refused(composed_paper, override):
    with pytest.raises(ConfigurationError, match=override.split("=")[0]):
        composed_paper("rank_scaling", "fast", override)
