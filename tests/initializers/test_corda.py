"""corda, against the formula with the inverse in float64: W R = U S Vᵀ, A = … Vᵀ R⁻¹."""

import pytest
import torch
from layers import layer_of
from measures import relative_gap
from models import llama, spread_weight, token_batches
from networks import Chain, chain_inputs

from lora_init import LoraConfig, get_peft_model
from lora_init.initializers.corda import CordaOptions, corda
from lora_init.linalg.moments import InputStatistics

SHAPES = [(48, 48), (80, 32), (32, 80)]
RANK = 6


def inputs(columns, tokens=2000, seed=0):
    """Correlated inputs, condition of R about 300: the inverse in the reference is accurate."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    scales = torch.logspace(0, -1.25, columns)
    return (torch.randn(tokens, columns, generator=generator) * scales) @ basis


def factors_of(weight, x, scaling=2.0, rank=RANK, **options):
    layer = layer_of(weight, rank, scaling, inputs=InputStatistics.of_rows(x))
    return corda(layer, CordaOptions(**options))


def reference(weight, x, scaling, mode, rank=RANK, damping=0.0):
    weight, x = weight.double(), x.double()
    moment = x.T @ x / len(x)
    moment += damping * moment.diagonal().mean() * torch.eye(len(moment))
    u, s, vt = torch.linalg.svd(weight @ moment, full_matrices=False)
    part = slice(0, rank) if mode == "ipm" else slice(len(s) - rank, len(s))
    u, s, vt = u[:, part], s[part], vt[part]
    root = (s / scaling).sqrt()
    return u * root, root[:, None] * vt @ torch.linalg.inv(moment)


def product(lora_B, lora_A, scaling):
    return scaling * lora_B.double() @ lora_A.double()


@pytest.mark.parametrize("scaling", [1 / 16, 2.0, 16.0])
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_the_formula_with_the_inverse(rows, columns, mode, damping, scaling):
    weight, x = spread_weight(rows, columns), inputs(columns)
    factors = factors_of(weight, x, scaling, corda_method=mode, damping=damping)
    lora_B, lora_A = reference(weight, x, scaling, mode, damping=damping)
    expected = product(lora_B, lora_A, scaling)
    actual = product(factors.lora_B, factors.lora_A, scaling)
    assert relative_gap(actual, expected) < 1e-3
    # Each pair of a column of B and a row of A, whose common sign is free.
    order = range(RANK) if mode == "ipm" else range(RANK - 1, -1, -1)
    for index, place in enumerate(order):
        ours = torch.outer(factors.lora_B[:, index], factors.lora_A[index]).double()
        assert relative_gap(ours, torch.outer(lora_B[:, place], lora_A[place])) < 1e-2
        for grown, base in ((factors.lora_B[:, index], lora_B[:, place]),
                            (factors.lora_A[index], lora_A[place])):  # fmt: skip
            assert float(grown.norm()) == pytest.approx(float(base.norm()), rel=1e-2)
    assert factors.metrics["evenly_split_components"].sum() == 0


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_product_is_a_projection_of_the_weight(rows, columns, mode):
    """s B A = U Uᵀ W: applying it to W's image twice is applying it once; W's part stays."""
    weight = spread_weight(rows, columns)
    factors = factors_of(weight, inputs(columns), corda_method=mode)
    basis = torch.linalg.qr(factors.lora_B.double())[0]
    expected = basis @ basis.T @ weight.double()
    assert relative_gap(product(factors.lora_B, factors.lora_A, 2.0), expected) < 1e-5


def test_modes_do_what_they_are_called():
    """ipm takes what the calibration inputs use most, kpm what they use least."""
    weight, x = spread_weight(64, 64), inputs(64)
    output = x.double() @ weight.double().T

    def share(mode):
        factors = factors_of(weight, x, corda_method=mode)
        part = x.double() @ product(factors.lora_B, factors.lora_A, 2.0).T
        return float(part.norm() / output.norm())

    pissa = torch.linalg.svd(weight.double(), full_matrices=False)
    top = (pissa[0][:, :RANK] * pissa[1][:RANK]) @ pissa[2][:RANK]
    assert share("ipm") > float((x.double() @ top.T).norm() / output.norm()) - 1e-3
    assert share("ipm") > 0.6
    assert share("kpm") < 0.1


@pytest.mark.parametrize(("rows", "columns"), [(80, 32), (200, 16)])
def test_kpm_of_a_tall_weight_is_not_its_null_space(rows, columns):
    """The smallest eigenvectors on the m x m side are W's left null space: s B A would be ~0."""
    weight = spread_weight(rows, columns)
    factors = factors_of(weight, inputs(columns), corda_method="kpm")
    expected = product(*reference(weight, inputs(columns), 2.0, "kpm"), 2.0)
    actual = product(factors.lora_B, factors.lora_A, 2.0)
    assert float(actual.norm()) == pytest.approx(float(expected.norm()), rel=1e-3)
    assert actual.norm() > 0.05 * weight.norm()


@pytest.mark.parametrize("scaling", [1 / 16, 16.0])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_fewer_tokens_than_inputs(rows, columns, mode, scaling):
    """R is rank-deficient: the inverse does not exist, the projection does; nothing blows up."""
    weight, x = spread_weight(rows, columns), inputs(columns, tokens=10)
    rank = 16
    factors = factors_of(weight, x, scaling, rank=rank, corda_method=mode)
    assert factors.lora_A.isfinite().all()
    assert factors.lora_B.isfinite().all()
    # U has orthonormal columns, so the factors of an even split are bounded by these.
    bound = scaling**-0.5
    assert factors.lora_A.norm() < 1e3 * bound * weight.norm()
    assert factors.lora_B.norm() < 1e3 * bound * rank**0.5
    actual = product(factors.lora_B, factors.lora_A, scaling)
    assert actual.norm() <= (1 + 1e-5) * weight.norm()
    assert actual.norm() > 0.05 * weight.norm()
    seen = x.double() @ weight.double().T
    part = x.double() @ actual.T
    if mode == "kpm":  # what the calibration inputs use stays in the frozen base
        assert part.norm() < 1e-3 * seen.norm()
        assert factors.metrics["evenly_split_components"].sum() >= rank - (min(rows, columns) - 10)
    else:  # ten directions hold all of it
        assert relative_gap(part, seen) < 1e-3
        assert factors.metrics["evenly_split_components"].sum() >= rank - 10


def test_ipm_with_few_tokens_is_the_reference_on_the_seen_directions():
    weight, x = spread_weight(40, 64), inputs(64, tokens=12)
    factors = factors_of(weight, x, rank=4, corda_method="ipm")
    moment = (x.T @ x / len(x)).double()
    u = torch.linalg.svd(weight.double() @ moment)[0][:, :4]
    actual = product(factors.lora_B, factors.lora_A, 2.0)
    assert relative_gap(actual, u @ u.T @ weight.double()) < 1e-3


@pytest.mark.parametrize("size", [100.0, 1000.0])
def test_massive_activations(size):
    """One input far above the others, as language models have: s_r is 1e-4 … 1e-6 of s_1."""
    weight, x = spread_weight(64, 64), inputs(64)
    x[:, 3] *= size
    x[:, 7] += size
    factors = factors_of(weight, x, corda_method="ipm")
    image = weight.double() @ (x.double().T @ x.double() / len(x))
    optimum = torch.linalg.svdvals(image)[RANK:].norm()
    basis = torch.linalg.qr(factors.lora_B.double())[0]
    assert (image - basis @ basis.T @ image).norm() < 1.001 * optimum


def test_scale_of_the_inputs_moves_norm_between_the_factors_only():
    weight, x = spread_weight(40, 40), inputs(40)
    one, ten = factors_of(weight, x), factors_of(weight, 10 * x)
    products = [product(factors.lora_B, factors.lora_A, 2.0) for factors in (one, ten)]
    assert relative_gap(*products) < 1e-4
    assert float(ten.lora_B.norm() / one.lora_B.norm()) == pytest.approx(10, rel=1e-3)
    assert float(one.lora_A.norm() / ten.lora_A.norm()) == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_end_to_end_on_a_chain(mode):
    """The statistics are those of the layer's own inputs."""
    base = Chain()
    batches = [chain_inputs(300, seed=seed) for seed in (1, 2)]
    x = torch.cat(batches)
    with torch.no_grad():
        hidden = {"square": x, "tall": torch.tanh(base.square(x))}
    weights = {name: base.get_submodule(name).weight.detach().clone() for name in hidden}
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=list(hidden),
        init_lora_weights="corda",
        corda_config={"corda_method": mode},
    )
    model = get_peft_model(base, config, calibration=batches)
    for name, layer in model.layers.items():
        expected = product(*reference(weights[name], hidden[name], 2.0, mode), 2.0)
        actual = product(layer.lora_B.detach(), layer.lora_A.detach(), 2.0)
        assert relative_gap(actual, expected) < 1e-2, name


def test_padding_is_not_seen():
    """Batches that differ in padded positions only give the same factors."""
    batches = token_batches()
    garbled = [b | {"input_ids": b["input_ids"] + 7 * (1 - b["attention_mask"])} for b in batches]
    config = LoraConfig(r=4, target_modules=["o_proj", "up_proj"], init_lora_weights="corda")
    first = get_peft_model(llama(), config, calibration=batches)
    second = get_peft_model(llama(), config, calibration=garbled)
    assert not torch.equal(batches[0]["input_ids"], garbled[0]["input_ids"])
    for name, layer in first.layers.items():
        other = second.layers[name]
        actual = product(layer.lora_B.detach(), layer.lora_A.detach(), 1.0)
        expected = product(other.lora_B.detach(), other.lora_A.detach(), 1.0)
        assert relative_gap(actual, expected) < 1e-4, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corda_method": "both"}, "corda_method='both'.*'ipm'.*'kpm'"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"damping": float("inf")}, "damping=inf"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(init_lora_weights="corda", corda_config=options)
