"""psd: the spectrum, size and mean of A, for each form."""

import math

import pytest
import torch
from layers import layer_of

from lora_init import LoraConfig, get_peft_model
from lora_init.initializers.psd import FORMS, PsdOptions, psd

every_form = pytest.mark.parametrize("form", FORMS)


def factors_of(rows, columns, rank, scaling=2.0, seed=0, **options):
    weight = torch.empty(rows, columns, device="meta")
    return psd(layer_of(weight, rank, scaling, seed=seed), PsdOptions(**options))


def slope(signals):
    """The exponent of the power over the frequency, of signals in rows."""
    power = torch.fft.rfft(signals.double()).abs().square().mean(0)[1:-1]
    frequencies = torch.arange(1, len(power) + 1, dtype=torch.float64).log()
    frequencies, levels = frequencies - frequencies.mean(), power.log() - power.log().mean()
    return float((frequencies * levels).sum() / frequencies.square().sum())


@every_form
@pytest.mark.parametrize(("rows", "columns", "rank"), [(20, 64, 8), (64, 20, 20)])
def test_mean_and_size(rows, columns, rank, form):
    factors = factors_of(rows, columns, rank, form=form)
    lora_A = factors.lora_A.double()
    assert lora_A.shape == (rank, columns)
    assert abs(float(lora_A.mean())) < 1e-7
    deviation = math.sqrt(2 / (columns + rank))
    assert float(lora_A.std(correction=0)) == pytest.approx(deviation, rel=1e-6)
    assert factors.lora_A.dtype == torch.float32
    assert factors.lora_B.shape == (rows, rank)
    assert not factors.lora_B.any()
    for scaling in (1.0, 5.66, 16.0):
        assert torch.equal(
            factors_of(rows, columns, rank, scaling, form=form).lora_A, factors.lora_A
        )
    assert not torch.equal(
        factors_of(rows, columns, rank, seed=1, form=form).lora_A, factors.lora_A
    )


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.6, 1.0])
def test_the_spectrum_follows_the_power_law(exponent):
    rank, columns = 64, 128
    forms = {form: factors_of(4, columns, rank, exponent=exponent, form=form) for form in FORMS}
    signals = {
        "signal": forms["signal"].lora_A.reshape(1, -1),
        "row": forms["row"].lora_A,
        "column": forms["column"].lora_A.T,
    }
    for form, rows in signals.items():
        assert slope(rows) == pytest.approx(-exponent, abs=1e-3), form
    for form in ("iid", "shuffle"):
        assert abs(slope(forms[form].lora_A.reshape(1, -1))) < 0.15


def test_a_shuffle_has_the_numbers_of_the_signal():
    signal, shuffled = (
        factors_of(8, 40, 6, form=form).lora_A.flatten() for form in ("signal", "shuffle")
    )
    torch.testing.assert_close(shuffled.sort().values, signal.sort().values)
    assert not torch.equal(shuffled, signal)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exponent": -1.0}, r"psd: exponent=-1.0 .* finite number >= 0"),
        ({"exponent": True}, r"psd: exponent=True .* finite number >= 0"),
        ({"form": "white"}, r"psd: form='white' .* signal, iid, shuffle, row, column"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(init_lora_weights={"name": "psd", **options})


def test_a_signal_of_one_number_is_refused():
    settings = {"name": "psd", "form": "column"}
    config = LoraConfig(r=1, target_modules=["0"], init_lora_weights=settings)
    with pytest.raises(ValueError, match="psd cannot have rank 1: a signal of one number"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
