"""matched_norm: the norm of a reference's product, and nothing else of it."""

import math

import pytest
import torch
from layers import layer_of
from models import spread_weight
from test_geora import best, masked

from lora_init import LoraConfig, get_peft_model
from lora_init.initializers.matched_norm import MatchedNormOptions, matched_norm, references


def factors_of(weight, rank, scaling=2.0, seed=0, **options):
    return matched_norm(layer_of(weight, rank, scaling, seed=seed), MatchedNormOptions(**options))


@pytest.mark.parametrize("shape", [(64, 96), (96, 40)])
@pytest.mark.parametrize("scaling", [1 / 16, 2.0])
def test_the_norm_is_the_references(shape, scaling):
    weight, rank = spread_weight(*shape), 8
    values = torch.linalg.svdvals(weight.double())[:rank]
    q = torch.linalg.qr(weight.double())[0][:, :rank]
    smallest = torch.linalg.svdvals(weight.double())[-rank:]
    share = math.log(rank, min(shape))
    wanted = {
        "pissa": values.norm(),
        "olora": scaling * (q.T @ weight.double()).norm(),
        "milora": smallest.norm(),
        "loram": weight.double().norm() * share**0.5,
        "geora": best(masked(weight, rank, 0.2), rank).norm(),
    }
    assert set(references()) == set(wanted), "each method has its norm here"
    for reference, norm in wanted.items():
        factors = factors_of(weight, rank, scaling, reference=reference)
        product = scaling * factors.lora_B.double() @ factors.lora_A.double()
        assert float(product.norm() / norm) == pytest.approx(1, abs=1e-4)
        assert float(factors.lora_A.norm() / factors.lora_B.norm()) == pytest.approx(1, abs=1e-5)


def test_spectrum_and_directions_are_random():
    weight, rank = spread_weight(512, 512), 4
    factors = factors_of(weight, rank)
    spread = torch.linalg.svdvals(factors.lora_A.double())
    assert float(spread[0] / spread[-1]) < 1.4  # the weight's: 2.6
    other = factors_of(weight, rank, seed=1)
    assert not torch.equal(other.lora_A, factors.lora_A)
    assert float(other.lora_A.norm()) == pytest.approx(float(factors.lora_A.norm()), rel=0.05)


def test_in_a_model_the_report_has_the_references_norm():
    def norms(method):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 16))
        config = LoraConfig(r=3, target_modules=["0", "1"], init_lora_weights=method)
        return [row.relative_norm for row in get_peft_model(base, config).init_report().layers]

    assert norms("matched_norm") == pytest.approx(norms("pissa"), rel=1e-4)


@pytest.mark.parametrize("reference", ["kaiming", "corda", "matched_norm", "pisa"])
def test_a_reference_without_a_product_to_match_is_refused(reference):
    with pytest.raises(ValueError, match=rf"reference='{reference}'.*olora, pissa"):
        MatchedNormOptions(reference=reference)
