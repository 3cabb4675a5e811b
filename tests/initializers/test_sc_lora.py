"""sc_lora: the eigenvectors of (1 - beta) P - beta N, from outputs in float64; and its two sets."""

import pytest
import torch
from measures import relative_gap
from models import half, llama, spread_weight, token_batches
from networks import chain_inputs

from lora_init import Calibration, LoraConfig, calibrate, get_peft_model, init_factors

SHAPES = [(48, 48), (80, 32), (32, 80)]
RANK = 6
SCALINGS = {1.0: (6, False), 2.0: (12, False), 5.66: (33.96, False), 16.0: (96, False)}
SCALINGS |= {"rslora": (6, True)}


def covariance(weight, x):
    outputs = x.double() @ weight.double().T
    return outputs.T @ outputs / len(outputs)


def reference(weight, learn, keep, beta, normalize="trace"):
    """Q Qᵀ W of the outputs' own second moments; and the eigenvalues, descending."""
    moments = [covariance(weight, x) for x in (learn, keep)]
    if normalize == "trace":
        moments = [moment / moment.trace() for moment in moments]
    matrix = (1 - beta) * moments[0] - beta * moments[1]
    span = torch.linalg.svd(weight.double(), full_matrices=False)[0]
    values, turns = torch.linalg.eigh(span.T @ matrix @ span)
    left = span @ turns.flip(1)[:, :RANK]
    return left @ left.T @ weight.double(), values.flip(0)


def factors_of(weight, learn, keep, *, alpha=12, use_rslora=False, rank=RANK, **options):
    return init_factors(
        weight, "sc_lora", r=rank, lora_alpha=alpha, use_rslora=use_rslora, options=options,
        inputs={"learn": learn, "keep": keep},
    )  # fmt: skip


def data(columns, tokens=300):
    return chain_inputs(tokens, columns, seed=1), chain_inputs(tokens, columns, seed=2)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_the_papers_formula(rows, columns, beta, scaling):
    weight, (learn, keep) = spread_weight(rows, columns), data(columns)
    alpha, use_rslora = SCALINGS[scaling]
    factors = factors_of(weight, learn, keep, alpha=alpha, use_rslora=use_rslora, beta=beta)
    s = alpha / (RANK**0.5 if use_rslora else RANK)
    expected, values = reference(weight, learn, keep, beta)
    product = s * factors.lora_B.double() @ factors.lora_A.double()
    assert relative_gap(product, expected) < 1e-4
    assert relative_gap(factors.lora_B.T @ factors.lora_B, torch.eye(RANK)) < 1e-5
    assert factors.metrics["positive_eigenvalues"] == min(RANK, int((values > 1e-6).sum()))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_outputs_may_include_the_bias(rows, columns):
    """Also under `get_peft_model`, which takes the layer's own bias."""
    layer = torch.nn.Linear(columns, rows)
    layer.weight.data = spread_weight(rows, columns)
    layer.bias.data = torch.linspace(-1, 1, rows)
    learn, keep = data(columns)
    learn, keep = learn + 0.5, keep - 0.3
    outputs = [layer(x).double().detach() for x in (learn, keep)]
    moments = [y.T @ y / len(y) for y in outputs]
    matrix = 0.6 * moments[0] / moments[0].trace() - 0.4 * moments[1] / moments[1].trace()
    both = torch.cat([layer.weight, layer.bias[:, None]], 1).double().detach()
    span = torch.linalg.svd(both, full_matrices=False)[0]
    left = span @ torch.linalg.eigh(span.T @ matrix @ span)[1].flip(1)[:, :RANK]
    expected = left @ left.T @ layer.weight.double().detach()
    settings = {"r": RANK, "options": {"beta": 0.4, "bias": True}}
    alone = init_factors(
        layer.weight, "sc_lora", bias=layer.bias, inputs={"learn": learn, "keep": keep}, **settings
    )
    assert relative_gap(alone.lora_B.double() @ alone.lora_A.double(), expected) < 1e-4
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["0"],
        init_lora_weights={"name": "sc_lora", "beta": 0.4, "bias": True},
    )  # fmt: skip
    model = get_peft_model(
        torch.nn.Sequential(layer), config, calibration={"learn": [learn], "keep": [keep]}
    )
    product = model.layers["0"].initial_product().double()
    assert relative_gap(product, expected) < 1e-4


def test_a_bias_that_is_not_read_is_refused():
    with pytest.raises(ValueError, match="bias=Tensor is not supported: sc_lora does not read it"):
        init_factors(
            torch.eye(4), "sc_lora", r=2, bias=torch.zeros(4),
            inputs={"learn": torch.eye(4), "keep": torch.eye(4)},
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"bias=\(3,\) is not supported: must be a tensor \(4,\)"):
        init_factors(
            torch.eye(4), {"name": "sc_lora", "bias": True}, r=2, bias=torch.zeros(3),
            inputs={"learn": torch.eye(4), "keep": torch.eye(4)},
        )  # fmt: skip


def test_without_normalization():
    weight, (learn, keep) = spread_weight(40, 40), data(40)
    factors = factors_of(weight, 3 * learn, keep, normalize="none", beta=0.4)
    expected, _ = reference(weight, 3 * learn, keep, 0.4, "none")
    assert relative_gap(2 * factors.lora_B @ factors.lora_A, expected) < 1e-4


def test_beta_0_is_the_best_copy_of_the_outputs():
    """Its output error is that of the truncated SVD of W C^(1/2), so "keep" plays no part."""
    weight, (learn, keep) = spread_weight(40, 56), data(56)
    factors = factors_of(weight, learn, keep, beta=0.0)
    lost = weight.double() - 2 * factors.lora_B.double() @ factors.lora_A.double()
    error = (learn.double() @ lost.T).square().sum() / len(learn)
    values = torch.linalg.eigvalsh(covariance(weight, learn))
    assert float(error) == pytest.approx(float(values[:-RANK].sum()), rel=1e-4)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_beta_0_is_astra(rows, columns):
    weight, (learn, keep) = spread_weight(rows, columns), data(columns)
    factors = factors_of(weight, learn, keep, beta=0.0)
    astra = init_factors(weight, "astra", r=RANK, lora_alpha=12, inputs=learn)
    assert relative_gap(factors.lora_B @ factors.lora_A, astra.lora_B @ astra.lora_A) < 1e-4


def test_beta_1_takes_the_outputs_that_keep_uses_least():
    weight, (learn, keep) = spread_weight(32, 48), data(48)
    with pytest.warns(UserWarning, match=r"sc_lora: in 1 of 1 layers.*lower beta or r"):
        factors = factors_of(weight, learn, keep, beta=1.0)
    least = torch.linalg.eigh(covariance(weight, keep))[1][:, :RANK]
    assert relative_gap(factors.lora_B @ factors.lora_B.T, least @ least.T) < 1e-3
    assert factors.metrics["positive_eigenvalues"] == 0
    assert factors.metrics["keep_energy"] < 0.01


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_full_rank_and_few_tokens(rows, columns):
    """At full rank, Q Qᵀ W is W. Fewer tokens than inputs leave directions that no set uses."""
    weight, (learn, keep) = spread_weight(rows, columns), data(columns, tokens=9)
    with pytest.warns(UserWarning, match="fewer directions"):
        factors = factors_of(weight, learn, keep, rank=min(rows, columns), alpha=min(rows, columns))
    assert relative_gap(factors.lora_B @ factors.lora_A, weight) < 1e-5
    assert factors.metrics["positive_eigenvalues"] <= 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, "beta=1.5.*from 0 to 1"),
        ({"normalize": "max"}, "must be one of trace, none"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(init_lora_weights={"name": "sc_lora", **options})


# -- two sets in one call --------------------------------------------------------------------------


def config(method="sc_lora"):
    return LoraConfig(
        r=2, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=method
    )


def sets():
    return {"learn": token_batches(seed=1), "keep": token_batches(seed=2)}


def factors_by_layer(model):
    return {n: (layer.lora_A.detach(), layer.lora_B.detach()) for n, layer in model.layers.items()}


def same(left, right):
    pairs = zip(factors_by_layer(left).values(), factors_by_layer(right).values(), strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


@pytest.mark.filterwarnings("ignore:sc_lora")
def test_every_way_to_pass_two_sets_gives_the_same(tmp_path, monkeypatch):
    """Batches, a calibration, its file, several passes, the cache; the order of the dict."""
    monkeypatch.setenv("LORA_INIT_CACHE", str(tmp_path / "cache"))
    model = get_peft_model(llama(), config(), calibration=sets(), cache=False)
    found = calibrate(llama(), config(), dict(reversed(sets().items())))
    found.save(tmp_path / "found")
    plan = get_peft_model(llama(), config(), dry_run=True)
    assert "in the sets learn, keep" in str(plan)
    memory = 2 * max(plan.input_bytes(target) for target in plan.targets)
    for settings in (
        {"calibration": found, "cache": False},
        {"calibration": Calibration.load(tmp_path / "found"), "cache": False},
        {"calibration": sets(), "cache": False, "calibration_memory": memory},
        {"calibration": sets()},
        {"calibration": sets()},  # from the cache
    ):
        assert same(get_peft_model(llama(), config(), **settings), model)
    exchanged = dict(zip(("keep", "learn"), sets().values(), strict=True))
    other = get_peft_model(llama(), config(), calibration=exchanged)
    assert not same(other, model)
    queries = model.layers["model.layers.0.self_attn.q_proj"]
    inputs = found.layers["model.layers.0.self_attn.q_proj"].inputs
    expected = init_factors(
        queries.original_weight(), "sc_lora", r=2, lora_alpha=8,
        inputs={name: inputs[name] for name in ("keep", "learn")},
    )  # fmt: skip
    torch.testing.assert_close(expected.lora_B, queries.lora_B.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("eva", sets(), "sets 'learn', 'keep'.*must be one set.*eva reads.*sets\\['learn'\\]"),
        ("sc_lora", token_batches(), "one unnamed set.*'learn', 'keep', which sc_lora compares"),
        ("sc_lora", {"learn": token_batches()}, "with 'learn' is not.*'learn', 'keep'"),
        ("sc_lora", {**sets(), "more": []}, "'more' is not supported: must be a dict"),
        ("sc_lora", None, "needs calibration data.*as a dict of the sets 'learn', 'keep'"),
    ],
)
def test_wrong_sets_are_refused_before_anything_changes(method, given, message):
    base = llama()
    state = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(method), calibration=given)
    if given is not None:
        with pytest.raises(ValueError, match=message.replace("calibration", "batches")):
            calibrate(base, config(method), given)
    assert state == {name: id(module) for name, module in base.named_modules()}
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_a_set_that_is_a_single_batch_is_refused():
    given = {"learn": token_batches(), "keep": half(token_batches()[0])}
    with pytest.raises((TypeError, ValueError), match="keep|dict"):
        get_peft_model(llama(), config(), calibration=given)


def test_methods_with_one_set_take_one_matrix_and_not_two():
    weight, (learn, keep) = spread_weight(16, 16), data(16)
    with pytest.raises(ValueError, match="inputs with the sets 'learn', 'keep'.*eva reads"):
        init_factors(weight, "eva", r=2, inputs={"learn": learn, "keep": keep})
    with pytest.raises(ValueError, match="inputs=Tensor.*'learn', 'keep', which sc_lora compares"):
        init_factors(weight, "sc_lora", r=2, inputs=learn)
