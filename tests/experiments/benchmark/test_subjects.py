"""The models that are measured, and the weights of known spectra."""

import pytest
import torch
from known_rates import RATES

from experiments.benchmark import powerlaw, quality, synthetic
from experiments.benchmark.contest import Arena
from experiments.benchmark.powerlaw import PowerLaw
from experiments.benchmark.settings import resolve
from experiments.benchmark.subjects import load_subject
from experiments.errors import ConfigurationError


def test_batches_have_the_asked_shape(settings):
    for name in settings.models:
        subject = load_subject(name, settings)
        batches = subject.calibration_batches(3) if name == "layer" else subject.training_batches(3)
        if name == "layer":
            assert [tuple(batch["x"].shape) for batch in batches] == [(64, 16)] * 3
            continue
        assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 8)] * 3
        assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
        assert all("labels" in batch for batch in batches)
        calibration = subject.calibration_batches(3)
        assert [tuple(batch["input_ids"].shape) for batch in calibration] == [(4, 16)] * 3
        assert all("labels" not in batch for batch in calibration)


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (20, 12), (16, 16)])
def test_a_power_law_weight_is_what_it_says(rows, columns):
    made = PowerLaw(rows, columns, "layer", seed=3)
    weight, k = made.weight(), min(rows, columns)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(values, made.values, rtol=1e-5, atol=1e-7)
    assert float(weight.std()) == pytest.approx(powerlaw.DEVIATION, rel=0.1)
    order = torch.arange(1, k + 1, dtype=torch.float64)
    torch.testing.assert_close(values / values[0], order**-0.7, rtol=1e-4, atol=0)
    for first, last in ((0, 3), (k - 3, k)):
        assert quality.overlap(made.left(first, last), left[:, first:last]) > 1 - 1e-8
        assert quality.overlap(made.right(first, last), right[first:last].T) > 1 - 1e-8
    assert torch.equal(weight, made.weight())
    assert not torch.equal(weight, PowerLaw(rows, columns, "other", seed=3).weight())


@pytest.mark.parametrize("size", [7, 8])
def test_both_cosine_transforms_agree(size):
    block = torch.randn(size, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(powerlaw.by_fft(block), powerlaw.cosine_transform(block))


def test_a_llama_of_power_laws(settings):
    subject = load_subject("llama", settings)
    assert len(subject.known) == 14
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(subject.model.get_submodule(name).weight, subject.known[name].weight())
    shape = settings.models["llama"].llama
    counted = sum(parameter.numel() for parameter in subject.model.parameters())
    norms = 5 * shape.hidden
    assert counted == synthetic.parameters(shape) + norms


def test_a_model_that_does_not_fit_is_refused(composed):
    settings = resolve(composed("model=llama2_7b_shapes"))
    with pytest.raises(ConfigurationError) as error:
        load_subject("llama2_7b_shapes", settings)
    assert "models.llama2_7b_shapes.llama has 6.5e9 parameters in bfloat16" in str(error.value)
    assert "use device=cuda on a GPU with 28 GiB" in str(error.value)
    assert "models.llama2_7b_shapes.llama.layers=1" in str(error.value)


def test_a_tiny_form_of_the_7b_shapes(composed):
    chosen = "models.llama2_7b_shapes.llama"
    settings = resolve(
        composed(
            "model=llama2_7b_shapes", f"{chosen}.layers=1", f"{chosen}.hidden=32",
            f"{chosen}.intermediate=48", f"{chosen}.heads=4", f"{chosen}.key_value_heads=4",
        )
    )  # fmt: skip
    subject = load_subject("llama2_7b_shapes", settings)
    assert next(subject.model.parameters()).dtype == torch.bfloat16
    settings.models["llama2_7b_shapes"].ranks = [2]
    made, told = Arena(subject, settings, RATES), []
    made.chosen.repetitions = 1
    made.compete(made.request(2, "pissa"), told.append)
    judged = [report for report in told if report.get("contender") == "ours" and "gap" in report]
    assert judged[0]["quality"]["overlap"] > 0.99
    assert judged[0]["gap"] < 0.05
