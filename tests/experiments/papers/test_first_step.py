"""LoRA-GA's claim: steps taken by autograd, bounds by a full SVD, verdicts on made-up rows."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from experiments.errors import ConfigurationError
from experiments.papers.claim import Verdict
from experiments.papers.first_step import claims
from experiments.papers.first_step.alignment import (
    adam_step,
    rank_bounds,
    relative_error,
    sgd_step,
)
from experiments.papers.first_step.measuring import CALIBRATION, FRESH, OWN_START
from experiments.papers.starts import configuration
from experiments.papers.tasks import load_with_task, task_batches
from lora_init import get_peft_model


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_autograd(weight_loss, lora_A, lora_B, optimizer):
    """d(B A) at the start along the change that an optimizer's first step makes."""
    A, B = (torch.nn.Parameter(factor.clone()) for factor in (lora_A, lora_B))
    weight_loss(B @ A).backward()
    optimizer([A, B]).step()
    return -((B.detach() - lora_B) @ lora_A + lora_B @ (A.detach() - lora_A))


@pytest.mark.parametrize("shape", [(7, 5), (5, 9)])
def test_steps_are_those_of_torch_optimizers(shape):
    gradient, lora_A, lora_B = drawn(*shape), drawn(2, shape[1], seed=1), drawn(shape[0], 2, seed=2)

    def loss(product):
        return (gradient * product).sum()  # its gradient is the same everywhere

    for step, optimizer in (
        (sgd_step, lambda p: torch.optim.SGD(p, lr=1.0)),
        (adam_step, lambda p: torch.optim.Adam(p, lr=1.0, eps=0.0)),
    ):
        left, right = step(gradient, lora_A, lora_B)
        torch.testing.assert_close(left @ right, by_autograd(loss, lora_A, lora_B, optimizer))


def test_a_frozen_factor_does_not_move():
    gradient, lora_A, lora_B = drawn(7, 5), drawn(2, 5, seed=1), drawn(7, 2, seed=2)
    left, right = sgd_step(gradient, lora_A, lora_B, ("lora_B",))
    torch.testing.assert_close(left @ right, lora_B @ lora_B.T @ gradient)


def test_the_error_is_the_least_over_all_lengths():
    gradient, left, right = drawn(6, 8), drawn(6, 3, seed=1), drawn(3, 8, seed=2)
    if float((gradient * (left @ right)).sum()) < 0:
        left = -left
    lengths = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:, None, None]
    distances = torch.linalg.matrix_norm(lengths * (left @ right) - gradient)
    expected = float(distances.min() / torch.linalg.matrix_norm(gradient))
    assert relative_error((left, right), gradient) == pytest.approx(expected, rel=1e-6)
    assert relative_error((-left, right), gradient) == 1.0
    assert relative_error((torch.zeros_like(left), right), gradient) == 1.0
    with pytest.raises(ValueError, match="gradient is zero"):
        relative_error((left, right), torch.zeros_like(gradient))


@pytest.mark.parametrize("shape", [(6, 11), (11, 6)])
def test_bounds_are_eckart_and_young(shape):
    gradient = drawn(*shape)
    u, s, v = torch.linalg.svd(gradient, full_matrices=False)
    for rank, bound in zip((1, 4, 6, 9), rank_bounds(gradient, (1, 4, 6, 9)), strict=True):
        rest = gradient - (u[:, :rank] * s[:rank]) @ v[:rank]
        assert bound == pytest.approx(float(rest.norm() / gradient.norm()), abs=1e-7)
        nearest = (u[:, :rank] * s[:rank], v[:rank])
        assert relative_error(nearest, gradient) == pytest.approx(bound, abs=1e-7)


def test_rows_are_those_of_plain_backward_passes(smoke, composed_paper):
    """A method that keeps the base, one that subtracts, one that moves the function."""
    settings = composed_paper("first_step", "smoke", "device=cpu")
    findings = smoke("first_step")
    shown = findings.tables[0].frame.set_index("method")
    kinds = findings.tables[1].frame.set_index(["data", "method"])
    data = settings.encoder
    subject = load_with_task("minilm", "cpu")
    shape = {"size": data.batch_size, "length": data.length}
    (batch,) = task_batches(subject, "train", data.calibration, **shape)
    names = [layer.name for layer in subject.every(data.every)]
    for method in ("orthogonal", "pissa", "lora_one"):
        model = get_peft_model(
            subject.model, configuration(method, names, settings.rank), calibration=[batch],
            cache=False,
        )  # fmt: skip
        for name in names:
            model.layers[name].base_layer.weight.requires_grad_(True)
        model.eval()(**batch).loss.backward()
        errors = []
        for name in names:
            layer = model.layers[name]
            G = layer.base_layer.weight.grad.double()
            A, B = layer.lora_A, layer.lora_B
            step = (B.grad.double() @ A.double() + B.double() @ A.grad.double()).detach()
            cosine = (step * G).sum() / (step.norm() * G.norm())
            errors.append(float((1 - cosine**2).sqrt()))
        layer_kinds = [layer.kind for layer in subject.every(data.every)]
        for kind, error in zip(layer_kinds, errors, strict=True):  # one block: a layer of a kind
            found = kinds.loc[("its own data", method), kind]
            assert found == pytest.approx(error, abs=2e-4), (method, kind)
        model.unload()
        subject.model.zero_grad()
        subject.model.requires_grad_(False)
        expected = float(torch.tensor(errors).quantile(0.5))
        assert shown.loc[method, "SGD, own data"] == pytest.approx(expected, abs=2e-4), method


def rows(model: str = "m", **errors: tuple[float, float]) -> pd.DataFrame:
    """(own data, fresh) by method, over a hundred layers of one model."""
    made = [
        {
            "model": model, "layer": layer, "batch": batch, "method": method, "data": data,
            "error": error, "zero_B": method == "kaiming", "bound": 0.3, "bound_r": 0.4,
            "moved": method == "lora_one",
        }
        for method, pair in errors.items()
        for data, error, batch in zip((CALIBRATION, FRESH), pair, (0, 0), strict=True)
        for layer in range(100)
    ]  # fmt: skip
    return pd.DataFrame(made)


def verdicts(frame: pd.DataFrame) -> list[Verdict]:
    return [claim.verdict for claim in claims.claims_of(frame)]


def test_verdicts_where_everything_holds():
    made = rows(lora_ga=(0.301, 0.5), pissa=(0.9, 0.9), kaiming=(0.95, 0.95))
    own = made[made["method"] == "pissa"].assign(method=OWN_START, error=0.0)
    found = claims.claims_of(pd.concat([made, own]))
    assert [claim.verdict for claim in found] == [Verdict.REPRODUCED] * 4
    assert [claim.published for claim in found] == [True, True, True, False]
    assert "closer than kaiming in every layer" in found[2].ours
    for claim in found:
        assert "contradicts: " in claim.criterion


def test_verdicts_where_nothing_does():
    made = rows(lora_ga=(0.9, 0.9), pissa=(0.5, 0.5), kaiming=(0.4, 0.4))
    assert verdicts(made) == [Verdict.CONTRADICTS] * 4


def test_verdicts_where_a_tenth_of_the_layers_disagrees():
    made = rows(lora_ga=(0.301, 0.5), pissa=(0.9, 0.9), kaiming=(0.95, 0.95))
    some = made["layer"] < 10
    made.loc[some & (made["method"] == "kaiming"), "error"] = 0.2
    made.loc[some & (made["method"] == "lora_ga") & (made["data"] == CALIBRATION), "error"] = 0.35
    assert verdicts(made) == [Verdict.SAME_DIRECTION] * 4
    assert (
        "at least 90% of the layers (the fewest beside kaiming)" in claims.claims_of(made)[2].ours
    )


def test_models_that_disagree_reproduce_nothing_and_contradict_nothing():
    first = rows("one", lora_ga=(0.301, 0.5), kaiming=(0.9, 0.9))
    second = rows("two", lora_ga=(0.7, 0.9), kaiming=(0.4, 0.6))
    found = verdicts(pd.concat([first, second]))
    assert [found[place] for place in (0, 2, 3)] == [Verdict.NOT_REPRODUCED] * 3


def test_medians_are_taken_on_each_model_for_itself():
    """Pooled, pissa would seem the closer: only the model of smaller errors has rows of it."""
    first = rows("one", lora_ga=(0.301, 0.2), pissa=(0.4, 0.4), kaiming=(0.9, 0.9))
    second = rows("two", lora_ga=(0.8, 0.8), kaiming=(0.9, 0.9))
    made = pd.concat([first, second])
    # On a tenth of the layers another is closer, so that medians decide.
    some = (made["layer"] < 10) & (made["method"] == "kaiming")
    made.loc[some, "error"] = 0.1
    found = claims.claims_of(made)
    assert found[3].verdict is Verdict.SAME_DIRECTION
    assert "one 0.20, the best other pissa 0.40; two 0.80, the best other kaiming 0.90" in (
        found[3].ours
    )


def test_a_method_that_moved_the_function_is_told_apart_on_fresh_data():
    made = rows(lora_ga=(0.301, 0.5), lora_one=(0.9, 0.45), kaiming=(0.95, 0.95))
    claim = claims.claims_of(made)[3]
    assert claim.verdict is Verdict.REPRODUCED
    assert "lora_one is closer in 100%" in claim.remark
    assert "m 0.45 beside LoRA-GA’s 0.50" in claim.remark
    made.loc[(made["method"] == "kaiming") & (made["layer"] < 10), "error"] = 0.1
    assert "Where another is closer it is kaiming (100%)." in claims.claims_of(made)[3].remark


def test_claims_without_the_methods_they_are_about_are_left_out():
    assert len(claims.claims_of(rows(lora_ga=(0.3, 0.5), lora_one=(0.9, 0.9)))) == 2
    assert len(claims.claims_of(rows(lora_ga=(0.3, 0.5), pissa=(0.9, 0.9)))) == 3


def test_a_bound_missed_by_most_layers_is_not_reproduced():
    made = rows(lora_ga=(0.35, 0.5), pissa=(0.9, 0.9), kaiming=(0.95, 0.95))
    assert verdicts(made)[1] is Verdict.NOT_REPRODUCED


def test_settings_are_refused_by_name(composed_paper):
    for override, message in (
        ("methods=[kaiming,pissa]", "lora_ga among them"),
        ("methods=[lora_ga,pisa]", "'pisa' starts no linear layer; did you mean 'pissa'"),
        ("encoder.fresh=0", "fresh=0; allowed are integers >= 1"),
        ("encoder.calibration=33", "calibration=33; allowed are multiples of batch_size=32"),
        ("rank=0", "rank=0"),
        ("models=[]", "models="),
    ):
        with pytest.raises(ConfigurationError, match=message):
            composed_paper("first_step", "fast", override)


def test_a_rank_that_a_method_cannot_serve_is_refused_by_name(composed_paper):
    from experiments.papers.first_step import reproduce

    settings = composed_paper("first_step", "smoke", "rank=300", "methods=[kaiming,lora_ga]")
    with pytest.raises(ConfigurationError, match="rank=300"):
        reproduce(settings)
