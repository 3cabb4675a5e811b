"""LoftQ's iterations and QERA's closed form: the measurements against dense float64 algebra."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import scipy.linalg
import torch
from torch import nn

from experiments.errors import ConfigurationError
from experiments.papers import loftq_iterations_errors as outputs
from experiments.papers import loftq_iterations_rows as training
from experiments.papers import loftq_iterations_starts as made
from experiments.papers.loftq_iterations_errors import (
    HiddenStates,
    NextTokens,
    mean_square_output,
    relative_norm,
    remaining,
)
from experiments.papers.subject import Layer, Subject
from lora_init import LoraConfig, calibrate
from lora_init.quantization import Quantizer

RANK = 3
NAMES = ("blocks.0.up", "blocks.0.down")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"up": nn.Linear(24, 40), "down": nn.Linear(40, 20)})]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (block,) = self.blocks
        return block["down"](torch.tanh(block["up"](x)))


@pytest.fixture
def ground() -> made.Ground:
    torch.manual_seed(0)
    model = Tiny().eval()
    mixing = torch.randn(24, 24) * torch.linspace(0.2, 3, 24)
    inputs = torch.randn(200, 24) @ mixing
    targets = [Layer(name, 0, name.split(".")[-1]) for name in NAMES]
    config = LoraConfig(r=1, target_modules=list(NAMES), init_lora_weights="qera")
    return made.Ground(
        Subject("tiny", "", model, None), targets,
        weights={n: model.get_submodule(n).weight.detach().clone() for n in NAMES},
        calibration=calibrate(model, config, [inputs]), seed=0,
    )  # fmt: skip


def inputs_of(ground: made.Ground, name: str) -> torch.Tensor:
    """R, float64."""
    return ground.calibration.layers[name].inputs.second_moment


def by_method(ground: made.Ground, bits: int = 2) -> dict[tuple[str, int], dict[str, tuple]]:
    """By start and layer: Q and s B A, float64."""
    found = {}
    for start in made.starts(ground, bits, RANK, [1, 2], [2]):
        found[start.method, start.iterations] = {
            name: (
                layer.base_layer.weight.detach().double().clone(),
                layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double(),
            )
            for name, layer in start.model.layers.items()
        }
    return found


def best_product(matrix: torch.Tensor) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix)
    return (left[:, :RANK] * values[:RANK]) @ right[:RANK]


def test_every_start_is_what_the_table_says(ground):
    found = by_method(ground)
    assert {method for method, _ in found} == set(made.METHODS)
    quantizer = Quantizer(kind="nf2", bits=2)
    for name, weight in ground.weights.items():
        plain = quantizer.roundtrip(weight).double()
        for method in ((made.PLAIN, 0), (made.QERA, 0), (made.DIAGONAL, 0), (made.LOFTQ, 1)):
            torch.testing.assert_close(found[method][name][0], plain)
        assert not found[made.PLAIN, 0][name][1].any()
        # LoftQ: quantize what its first product leaves, then decompose what that loses.
        first = best_product(weight.double() - plain)
        torch.testing.assert_close(found[made.LOFTQ, 1][name][1], first, atol=1e-4, rtol=1e-3)
        for method in ((made.LOFTQ, 2), (made.SVD_FIRST, 2)):
            base, product = found[method][name]
            assert not torch.allclose(base, plain)
            torch.testing.assert_close(
                product, best_product(weight.double() - base), atol=1e-4, rtol=1e-3
            )
        # SVD first shares QPiSSA's base, which is what its own product leaves, quantized.
        base, product = found[made.QPISSA, 2][name]
        torch.testing.assert_close(found[made.SVD_FIRST, 2][name][0], base)
        left = (weight.double() - product).float()
        assert (quantizer.roundtrip(left).double() - base).abs().gt(1e-5).double().mean() < 0.01
        torch.testing.assert_close(
            found[made.LOFTQ_QERA, 2][name][0], found[made.LOFTQ, 2][name][0]
        )


def test_the_closed_form_is_the_papers_with_square_roots(ground):
    found = by_method(ground)
    for name, weight in ground.weights.items():
        exact = inputs_of(ground, name)
        for method, moment in (
            ((made.QERA, 0), exact),
            ((made.DIAGONAL, 0), exact.diagonal().diag()),
            ((made.LOFTQ_QERA, 2), exact),
        ):
            base, product = found[method][name]
            root = torch.from_numpy(scipy.linalg.sqrtm(moment.numpy()).real)
            lost = (weight.double() - base) @ root
            expected = torch.linalg.svdvals(lost)[RANK:].square().sum()
            error = weight.double() - base - product
            reached = (error @ moment * error).sum()
            assert float(reached) == pytest.approx(float(expected), rel=2e-3), (name, method)


def test_the_original_weights_come_back(ground):
    by_method(ground, bits=8)
    for name, weight in ground.weights.items():
        torch.testing.assert_close(ground.subject.model.get_submodule(name).weight, weight)


def test_errors_of_a_layer_are_those_of_dense_products(ground):
    config = {"name": "loftq", "loftq_bits": 4, "loftq_iter": 1}
    with ground.started(RANK, config) as model, torch.no_grad():
        for name, layer in model.layers.items():
            weight = ground.weights[name]
            dense = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
            left = weight.double() - layer.base_layer.weight.double() - dense
            found = remaining(layer, weight)
            assert relative_norm(found, weight) == pytest.approx(
                float(left.norm() / weight.double().norm()), rel=1e-4
            )
            moment = inputs_of(ground, name)
            expected = torch.trace(left @ moment @ left.T)
            assert mean_square_output(found, moment.float()) == pytest.approx(
                float(expected), rel=1e-3
            )


class Logits(nn.Module):
    """A "model" with given logits and hidden states, by token."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False):
        return SimpleNamespace(
            logits=self.table[input_ids], hidden_states=(None, self.table[input_ids])
        )


def test_divergence_and_perplexity_are_those_of_their_definitions():
    torch.manual_seed(1)
    before, now = torch.randn(7, 7), torch.randn(7, 7)
    blocks = torch.randint(0, 7, (5, 9))
    found = NextTokens(Logits(before), blocks)(Logits(now))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "BLOCKS_AT_ONCE", 1)
        alone = [NextTokens(Logits(before), block[None])(Logits(now)) for block in blocks]
    p, q = before.double().softmax(-1), now.double().softmax(-1)
    pairs = [(int(a), int(b)) for row in blocks for a, b in itertools.pairwise(row)]
    divergence = sum(float((p[a] * (p[a] / q[a]).log()).sum()) for a, _ in pairs) / len(pairs)
    loss = -sum(float(q[a, b].log()) for a, b in pairs) / len(pairs)
    assert found.error == pytest.approx(divergence, rel=1e-5)
    assert found.perplexity == pytest.approx(2.718281828459045**loss, rel=1e-5)
    assert found.texts == pytest.approx([one.error for one in alone], rel=1e-6)
    assert found.losses == pytest.approx([one.losses[0] for one in alone], rel=1e-6)
    same = NextTokens(Logits(before), blocks)
    assert same(Logits(before)).error == pytest.approx(0, abs=1e-6)


def test_hidden_states_of_padding_do_not_count():
    before, now = torch.eye(4), torch.eye(4)
    now[1] *= 3  # off by 2 of norm 1
    now[3] *= 100  # the padding's token
    batch = {
        "input_ids": torch.tensor([[0, 1, 3], [2, 2, 2]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    found = HiddenStates(Logits(before), [batch])(Logits(now))
    assert found.error == pytest.approx((4 / 5) ** 0.5)
    assert found.texts == pytest.approx((2**0.5, 0.0))


def test_the_head_is_trained_and_comes_back_as_it_was(ground):
    model = ground.subject.model
    model.classifier = nn.Linear(20, 2)
    before = model.classifier.weight.detach().clone()
    seen = []
    for method, arm in training.arms(ground, RANK, 1):
        trained = {name: p for name, p in arm.named_parameters() if p.requires_grad}
        heads = [p for name, p in trained.items() if "classifier" in name]
        assert len(trained) == 2 * len(NAMES) + 2
        torch.testing.assert_close(heads[0], before)
        heads[0].data.zero_()  # as a training would leave it changed
        seen.append(method)
    assert seen == [made.LOFTQ, made.SVD_FIRST, made.PLAIN]
    torch.testing.assert_close(model.classifier.weight, before)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "bits=[4,8]",
            r"bits=\[4, 8\] is not supported: must be some of 2, 4 and 8, with 2 and 4 among",
        ),
        ("language_bits=[2]", r"language_bits=\[2\] .* with 4 among them"),
        ("bits=[2,3,4]", r"bits=\[2, 3, 4\] is not supported: must be some of 2, 4 and 8"),
        ("ranks=[0]", r"ranks=\[0\] is not supported: must be integers >= 1"),
        ("language_ranks=[]", r"language_ranks=\[\] is not supported: must be integers >= 1"),
        ("iterations=[1,10]", r"iterations=\[1, 10\] .* another one up to 5"),
        (
            "order_iterations=[4]",
            r"order_iterations=\[4\] is not supported: must be some of iterations=",
        ),
        ("training_seeds=[1]", r"training_seeds=\[1\] is not supported: must be two different"),
    ],
)
def test_bad_settings_are_refused_by_name(composed_paper, override, message):
    with pytest.raises(ConfigurationError, match=message):
        composed_paper("loftq_iterations", "fast", override)


def test_a_rank_above_a_layer_is_refused_by_name(ground):
    with (
        pytest.raises(ConfigurationError, match="rank 64: .*exceeds"),
        ground.started(64, {"name": "loftq"}),
    ):
        pass
