"""Tests of the reproduction of LoRA-GA: steps, bounds, measured rows and every verdict."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from experiments.errors import ConfigurationError
from experiments.measures.fidelity import first_step, relative_error
from experiments.papers import first_step as page
from experiments.papers.claim import Verdict
from experiments.papers.first_step_rows import (
    CALIBRATION,
    FRESH,
    measure,
    rank_bounds,
)
from experiments.papers.reproduction import Measurement
from experiments.papers.starts import configuration
from experiments.papers.tasks import load_with_task, task_batches
from lora_init import get_peft_model


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, 5), (5, 9)])
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_steps_equal_those_of_torch_optimizers(shape, rule):
    gradient, lora_A, lora_B = drawn(*shape), drawn(2, shape[1], seed=1), drawn(shape[0], 2, seed=2)
    A, B = (torch.nn.Parameter(factor.clone()) for factor in (lora_A, lora_B))
    (gradient * (B @ A)).sum().backward()
    optimizers = {"sgd": torch.optim.SGD([A, B], 1.0), "adam": torch.optim.Adam([A, B], 1.0, eps=0)}
    optimizers[rule].step()
    expected = -((B.detach() - lora_B) @ lora_A + lora_B @ (A.detach() - lora_A))
    left, right = first_step(rule, gradient, lora_A, lora_B)
    torch.testing.assert_close(left @ right, expected)
    left, right = first_step("sgd", gradient, lora_A, lora_B, ("lora_B",))
    torch.testing.assert_close(left @ right, lora_B @ lora_B.T @ gradient)


def test_the_error_is_the_smallest_over_all_lengths():
    gradient, left, right = drawn(6, 8), drawn(6, 3, seed=1), drawn(3, 8, seed=2)
    if float((gradient * (left @ right)).sum()) < 0:
        left = -left
    lengths = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:, None, None]
    distances = torch.linalg.matrix_norm(lengths * (left @ right) - gradient)
    expected = float(distances.min() / torch.linalg.matrix_norm(gradient))
    assert relative_error((left, right), gradient) == pytest.approx(expected, rel=1e-6)
    assert relative_error((-left, right), gradient) == 1.0
    assert relative_error((torch.zeros_like(left), right), gradient) == 1.0
    with pytest.raises(ValueError, match="a gradient of zero"):
        relative_error((left, right), torch.zeros_like(gradient))


@pytest.mark.parametrize("shape", [(6, 11), (11, 6)])
def test_bounds_are_those_of_a_truncated_svd(shape):
    gradient = drawn(*shape)
    u, s, v = torch.linalg.svd(gradient, full_matrices=False)
    for rank, bound in zip((1, 4, 9), rank_bounds(gradient, (1, 4, 9)), strict=True):
        nearest = (u[:, :rank] * s[:rank], v[:rank])
        assert relative_error(nearest, gradient) == pytest.approx(bound, abs=1e-7)


@pytest.mark.exhaustive
def test_measured_errors_equal_those_of_plain_backward_passes(smoke_rows):
    """One method keeps the base, one subtracts, one changes the function."""
    methods = ("orthogonal", "pissa", "lora_one")
    measured = smoke_rows("first_step")
    options, rows = measured.options, measured["steps"]
    data = options.encoder
    subject = load_with_task("minilm", "cpu")
    shape = {"size": data.batch_size, "length": data.length}
    (batch,) = task_batches(subject, "train", data.calibration, **shape)
    names = [layer.name for layer in subject.every(data.every)]
    for method in methods:
        found = rows[(rows["method"] == method) & (rows["data"] == CALIBRATION)]
        found = found.set_index("layer")["error"]
        config = configuration(method, names, options.rank)
        model = get_peft_model(subject.model, config, calibration=[batch], cache=False)
        for name in names:
            model.layers[name].base_layer.weight.requires_grad_(True)
        model.eval()(**batch).loss.backward()
        for name in names:
            layer = model.layers[name]
            G, A, B = layer.base_layer.weight.grad.double(), layer.lora_A, layer.lora_B
            step = (B.grad.double() @ A.double() + B.double() @ A.grad.double()).detach()
            cosine = (step * G).sum() / (step.norm() * G.norm())
            assert found[name] == pytest.approx(float((1 - cosine**2).sqrt()), abs=2e-4)
        model.unload()
        subject.model.zero_grad()
        subject.model.requires_grad_(False)


def rows(model: str = "m", **errors: tuple[float, float]) -> pd.DataFrame:
    """Errors by method, on its own data and on fresh data, over a hundred layers of one model."""
    return pd.DataFrame(
        {
            "model": model,
            "layer": layer,
            "batch": 0,
            "method": method,
            "data": data,
            "error": error,
            "zero_B": method == "kaiming",
            "bound": 0.3,
            "bound_r": 0.4,
            "moved": method == "lora_one",
        }
        for method, pair in errors.items()
        for data, error in zip((CALIBRATION, FRESH), pair, strict=True)
        for layer in range(100)
    )


def claims(*frames: pd.DataFrame) -> list:
    return page.judge_all(Measurement(None, {"steps": pd.concat(frames)}, {}))


GOOD = {"lora_ga": (0.301, 0.5), "pissa": (0.9, 0.9), "kaiming": (0.95, 0.95)}


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        (GOOD, Verdict.REPRODUCED),
        (
            {"lora_ga": (0.9, 0.9), "pissa": (0.5, 0.5), "kaiming": (0.4, 0.4)},
            Verdict.CONTRADICTS,
        ),
    ],
)
def test_all_verdicts_where_every_layer_agrees(errors, verdict):
    made = rows(**errors)
    found = claims(made)
    assert [claim.verdict for claim in found] == [verdict] * 4
    assert [claim.published for claim in found] == [True, True, True, False]


def test_same_direction_where_a_tenth_of_the_layers_disagrees():
    made = rows(**GOOD)
    some = made["layer"] < 10
    made.loc[some & (made["method"] == "kaiming"), "error"] = 0.2
    made.loc[some & (made["method"] == "lora_ga") & (made["data"] == CALIBRATION), "error"] = 0.35
    found = claims(made)
    assert [claim.verdict for claim in found] == [Verdict.SAME_DIRECTION] * 4
    assert "at least 90% of the layers (the fewest with kaiming)" in found[2].ours


def test_models_that_disagree_neither_reproduce_nor_contradict():
    first = rows("one", lora_ga=(0.301, 0.5), kaiming=(0.9, 0.9))
    second = rows("two", lora_ga=(0.7, 0.9), kaiming=(0.4, 0.6))
    found = [claim.verdict for claim in claims(first, second)]
    assert [found[place] for place in (0, 2, 3)] == [Verdict.NOT_REPRODUCED] * 3


def test_a_bound_missed_by_most_layers_is_not_reproduced():
    made = rows(**GOOD | {"lora_ga": (0.35, 0.5)})
    assert claims(made)[1].verdict == Verdict.NOT_REPRODUCED


def test_methods_that_change_the_function_are_left_out_on_fresh_data():
    made = rows(lora_ga=(0.301, 0.5), lora_one=(0.9, 0.45), kaiming=(0.95, 0.95))
    claim = claims(made)[3]
    assert claim.verdict == Verdict.REPRODUCED
    assert claim.remark.endswith("lora_one.")
    assert len(claims(rows(lora_ga=(0.3, 0.5), lora_one=(0.9, 0.9)))) == 2


@pytest.mark.parametrize(
    "override",
    [
        "methods=[kaiming,pissa]",
        "methods=[lora_ga,pisa]",
        "encoder.fresh=0",
        "encoder.calibration=33",
        "rank=0",
        "models=[]",
    ],
)
def test_unsupported_options_are_refused(composed_paper, override):
    with pytest.raises(ConfigurationError, match=override.split("=")[0].split(".")[-1]):
        composed_paper("first_step", "fast", override)


def test_a_rank_that_a_method_does_not_support_is_refused(composed_paper):
    options = composed_paper("first_step", "smoke", "rank=300", "methods=[kaiming,lora_ga]")
    with pytest.raises(ConfigurationError, match="rank=300"):
        measure(options)
