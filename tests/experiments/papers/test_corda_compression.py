"""CorDA's compression: projections against dense decompositions, inverses and all, in float64."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_llama import some_blocks, tiny_llama

from experiments.errors import ConfigurationError
from experiments.papers import corda_compression as claims
from experiments.papers.claim import Verdict
from experiments.papers.corda_compression_projections import METHODS, Inputs, least_components
from experiments.papers.corda_compression_rows import dropped, losses_by_fraction, observe_inputs
from experiments.papers.language import block_losses
from experiments.papers.subject import restored
from lora_init import init_factors
from lora_init.initializers.corda import CordaOptions
from lora_init.linalg.moments import InputStatistics

SHAPES = [(12, 12), (20, 9), (9, 20)]


def layer(shape: tuple[int, int], tokens: int = 200):
    """A weight, inputs that are correlated, and what calibration would see of them."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    mixing = torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -1.5, shape[1], dtype=torch.float64)
    rows = torch.randn(tokens, shape[1], generator=generator, dtype=torch.float64) @ (
        mixing * scales[:, None]
    )
    inputs = Inputs(rows.T @ rows / tokens, rows.abs().mean(0))
    return weight, rows, inputs


def compressed(weight: np.ndarray, metric: np.ndarray, kept: int) -> np.ndarray:
    """The papers' own recipe: W M cut to its leading triplets, times the inverse of M."""
    left, values, right = np.linalg.svd(weight @ metric, full_matrices=False)
    return (left[:, :kept] * values[:kept]) @ right[:kept] @ np.linalg.inv(metric)


def metric_of(method: str, inputs: Inputs) -> np.ndarray:
    moment = inputs.second_moment.numpy()
    # Lifted as documented; ill-conditioned inputs make even a millionth visible.
    moment = moment + 1e-6 * np.diag(moment).mean() * np.eye(len(moment))
    if method == "plain":
        return np.eye(len(moment))
    if method == "asvd":
        return np.diag(inputs.magnitude.numpy() ** 0.5)
    if method == "corda":
        return moment
    values, vectors = np.linalg.eigh(moment)
    return (vectors * values**0.5) @ vectors.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_is_the_cut_svd_times_the_inverse(method, shape):
    weight, _, inputs = layer(shape)
    least = least_components(weight, method, inputs, 6)
    for count in (1, 4, 6):
        expected = compressed(
            weight.double().numpy(), metric_of(method, inputs), min(shape) - count
        )
        found = (weight - least.product(0, count)).double().numpy()
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("shape", SHAPES)
def test_whitening_leaves_the_least_output_error(shape):
    weight, rows, inputs = layer(shape)
    errors = {}
    for method in METHODS:
        change = least_components(weight, method, inputs, 4).product(0, 4).double()
        errors[method] = float((rows @ change.T).square().sum(1).mean())
    outputs = np.linalg.svd(rows.numpy() @ weight.double().numpy().T, compute_uv=False)
    optimum = (outputs[min(shape) - 4 : min(shape)] ** 2).sum() / len(rows)
    assert errors["whitened"] == pytest.approx(optimum, rel=1e-3)
    assert min(errors["plain"], errors["asvd"], errors["corda"]) > optimum


@pytest.mark.parametrize("shape", SHAPES)
def test_corda_drops_what_its_initializer_would_train(shape):
    weight, rows, _ = layer(shape)
    statistics = InputStatistics.of_rows(rows.float())
    inputs = Inputs(statistics.second_moment, rows.abs().mean(0))
    factors = init_factors(weight, CordaOptions("kpm"), r=4, lora_alpha=8, inputs=statistics)
    expected = 2.0 * factors.lora_B @ factors.lora_A
    found = least_components(weight, "corda", inputs, 4).product(0, 4)
    assert torch.allclose(found, expected, atol=1e-4 * float(weight.abs().max()))


def test_calibration_sees_the_inputs_that_pass():
    model, blocks = tiny_llama(), some_blocks()
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    seen = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].flatten(0, 1).double())
        )
    found = observe_inputs(model, names, blocks, batch_size=4)
    for name in names:
        rows = torch.cat(seen[name])
        assert torch.allclose(found[name].magnitude, rows.abs().mean(0), rtol=1e-5)
        expected = rows.T @ rows / len(rows)
        assert torch.allclose(found[name].second_moment, expected, atol=1e-5 * expected.max())


@pytest.mark.parametrize("method", ["plain", "corda"])
def test_losses_are_those_of_a_model_compressed_by_hand(method):
    model, blocks = tiny_llama(), some_blocks()
    names = [name for name, module in model.named_modules() if name.endswith("_proj")]
    inputs = observe_inputs(model, names, blocks, batch_size=4)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = losses_by_fraction(
        model, names, method, inputs, [0.25, 0.5], blocks, alpha=0.5, batch_size=4
    )
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    other = tiny_llama()
    for name in names:
        weight = other.get_submodule(name).weight.data
        kept = min(weight.shape) - round(0.5 * min(weight.shape))
        made = compressed(weight.double().numpy(), metric_of(method, inputs[name]), kept)
        weight.copy_(torch.from_numpy(made))
    assert torch.allclose(found[0.5], block_losses(other, blocks), atol=1e-3)
    assert not torch.allclose(found[0.25], found[0.5], atol=1e-3)


def test_weights_come_back_after_a_failure():
    model = tiny_llama()
    before = model.model.layers[0].mlp.up_proj.weight.clone()

    def fail():
        with restored({"up": model.model.layers[0].mlp.up_proj.weight}):
            model.model.layers[0].mlp.up_proj.weight.data.zero_()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


@pytest.mark.parametrize(
    ("shape", "fraction", "count"),
    [((576, 1536), 0.25, 144), ((192, 576), 1 / 256, 1), ((192, 576), 0, 0), ((9, 4), 0.5, 2)],
)
def test_a_fraction_is_of_the_smaller_side(shape, fraction, count):
    assert dropped(shape, fraction) == count


# -- verdicts --------------------------------------------------------------------------------------

FULL = 10.0


def frame(
    plain=80.0, asvd=30.0, corda=11.0, whitened=10.8, few=11.5, foreign=15.0, noise=0.0
):  # fmt: skip
    """Perplexities at a quarter; `noise` of the blocks' losses, which no two methods share."""
    rows, noises = [], iter(np.random.default_rng(0).normal(size=(12, 3)))
    for method, corpus, tokens, quarter in (
        ("plain", "–", 0, plain),
        ("asvd", "plots", 100, asvd),
        ("corda", "plots", 100, corda),
        ("whitened", "plots", 100, whitened),
        ("corda", "plots", 10, few),
        ("corda", "problems", 100, foreign),
    ):
        for fraction in (0.125, 0.25):
            found = FULL * (quarter / FULL) ** (fraction / 0.25)
            drawn = next(noises)
            common = np.array([-0.5, 0.5, 0.0]) + math.log(found)
            losses = torch.from_numpy(common + noise * (drawn - drawn.mean()))
            rows.append(
                {
                    "method": method,
                    "corpus": corpus,
                    "tokens": tokens,
                    "fraction": fraction,
                    "perplexity": found,
                    "nats": math.log(found / FULL),
                    "error": 0.0,
                    "losses": losses,
                }
            )
    return pd.DataFrame(rows)


R, S, N, C = (
    Verdict.REPRODUCED,
    Verdict.SAME_DIRECTION,
    Verdict.NOT_REPRODUCED,
    Verdict.CONTRADICTS,
)


@pytest.mark.parametrize(
    ("figures", "number", "verdict"),
    [
        ({}, 0, R),
        ({"asvd": 90.0}, 0, S),
        ({"asvd": 10.5}, 0, N),
        ({"corda": 99.0}, 0, C),
        ({}, 1, R),
        ({"corda": 15.0}, 1, S),
        ({"corda": 40.0}, 1, N),
        ({}, 2, R),
        ({"foreign": 50.0}, 2, S),
        ({"foreign": 99.0}, 2, N),
        ({"foreign": 10.5}, 2, C),
        ({"corda": 99.0}, 1, C),
        ({}, 3, R),
        ({"few": 12.5}, 3, S),
        ({"noise": 0.5}, 3, S),
        ({"few": 10.5, "noise": 0.5}, 3, N),
        ({"few": 10.5}, 3, C),
        ({}, 4, R),
        ({"whitened": 11.2, "noise": 0.5}, 4, N),
        ({"whitened": 11.2}, 4, C),
    ],
)
def test_verdicts_follow_the_figures(figures, number, verdict):
    claim = claims.all_claims(frame(**figures), FULL, 576)[number]
    assert claim.verdict is verdict
    assert "contradicts: " in claim.criterion
    assert claim.published is (number != 4)


def test_whitening_that_is_better_at_a_quarter_only_is_a_direction():
    made = frame()
    made.loc[(made["method"] == "whitened") & (made["fraction"] == 0.125), "perplexity"] = 99.0
    assert claims.all_claims(made, FULL, 576)[4].verdict is S


def test_remarks_are_computed():
    kept, _, few = claims.all_claims(frame(corda=15.0, few=40.0), FULL, 576)[1:4]
    assert "The model is 576 wide, the paper’s 4,096" in kept.remark
    assert "The tokens are 0.017 times the model’s width" in few.remark
    assert not any(claim.remark for claim in claims.all_claims(frame(), FULL, 576))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fractions=[0.25]", r"fractions=\[0.25\] is not supported: must be two or more"),
        ("fractions=[0.25,1.0]", "in 0 < x < 1"),
        ("fractions=[0.1,0.2]", "must be a list with 0.25"),
        ("few_tokens=9000", "few_tokens=9000 is not supported: must be from length=128 to below"),
        ("test_tokens=128", "test_tokens=128 is not supported: must be two blocks of length=128"),
    ],
)
def test_settings_that_measure_nothing_are_refused(composed_paper, override, message):
    with pytest.raises(ConfigurationError, match=message):
        composed_paper("corda_compression", "fast", override)
