"""eva: the principal components of the stacked, unmasked inputs, and the ranks they are given."""

import copy
import math
from typing import ClassVar

import pytest
import torch
from layers import layer_of
from measures import relative_gap
from models import bert, llama, token_batches
from networks import Chain, chain_inputs
from torch import nn

from lora_init import LoraConfig, calibrate, get_peft_model
from lora_init.initializers.eva import EvaOptions, eva
from lora_init.layer import LayerRequest, LayerStatistics
from lora_init.linalg import cores
from lora_init.linalg.moments import InputStatistics

LLAMA_TARGETS = ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]


def config_for(targets, *, r=4, **options):
    settings = {key: options.pop(key) for key in ("lora_alpha", "use_rslora", "rank_pattern")
                if key in options}  # fmt: skip
    return LoraConfig(
        r=r,
        target_modules=targets,
        init_lora_weights="eva",
        eva_config={"rho": 1.0} | options,
        **settings,
    )


@torch.no_grad()
def stacked_inputs(model, names, batches, mask_of=lambda batch: batch["attention_mask"]):
    """All unmasked input rows of every layer, in float64: this test's own collection."""
    rows = {name: [] for name in names}
    current = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: rows[name].append(
                args[0][current["mask"].bool()] if current["mask"] is not None
                else args[0].flatten(0, -2)
            )
        )
        for name in names
    ]  # fmt: skip
    model.eval()
    for batch in batches:
        current["mask"] = mask_of(batch)
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in rows.items()}


def principal(x, rank, center):
    """Variances of all components, and the first `rank` directions as rows."""
    x = x - x.mean(0) if center else x
    _, s, vt = torch.linalg.svd(x, full_matrices=False)
    return s.square() / len(x), vt[:rank]


def assert_principal(lora_A, x, center, rank):
    """Rows orthonormal, variances those of PCA, row by row the same direction up to a sign."""
    lora_A = lora_A.detach().double()
    variances, directions = principal(x, rank, center)
    torch.testing.assert_close(
        lora_A @ lora_A.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-5
    )
    centred = x - x.mean(0) if center else x
    captured = (centred @ lora_A.T).square().sum() / len(x)
    assert captured >= (1 - 1e-5) * variances[:rank].sum()
    gaps = (variances[: rank + 1].diff().abs() / variances[0])[:rank]
    for row, direction, gap in zip(lora_A, directions, gaps, strict=True):
        if gap > 0.02:  # else the direction itself is hardly determined
            assert abs(float(row @ direction)) > 1 - 1e-3


@pytest.mark.parametrize("center", [True, False])
def test_is_pca_of_the_unmasked_inputs(center):
    batches = token_batches()
    base = llama()
    model = get_peft_model(
        copy.deepcopy(base), config_for(LLAMA_TARGETS, center=center), calibration=batches
    )
    inputs = stacked_inputs(base, list(model.layers), batches)
    assert len(model.layers) == 10
    for name, layer in model.layers.items():
        assert_principal(layer.lora_A, inputs[name], center, 4)
        assert not layer.lora_B.any()
        variances, _ = principal(inputs[name], 4, center)
        explained = float(variances[:4].sum() / variances.sum())
        report = next(row for row in model.init_report().layers if row.name == name)
        assert report.details["explained_variance"] == pytest.approx(explained, rel=1e-4)


def test_cores_share_the_allocation_and_change_nothing(monkeypatch):
    """Layers that read one input share what is found, however many threads look for it."""
    monkeypatch.setattr(cores, "POOLED", 5000)  # eight inputs of 32 numbers or more: a pool
    base, config = llama(), config_for(LLAMA_TARGETS, rho=2.0)
    found = calibrate(base, config, token_batches())
    alone, together = (copy.deepcopy(found) for _ in range(2))
    alone = get_peft_model(copy.deepcopy(base), config, calibration=alone)
    torch.set_num_threads(3)
    try:
        together = get_peft_model(copy.deepcopy(base), config, calibration=together)
    finally:
        torch.set_num_threads(1)
    assert len({layer.rank for layer in alone.layers.values()}) > 1
    assert alone.layers.keys() == together.layers.keys()
    for name, layer in alone.layers.items():
        assert torch.equal(layer.lora_A, together.layers[name].lora_A)


def test_centring_matters_where_the_mean_does():
    base = Chain()
    x = chain_inputs(400) + 3.0 * torch.arange(32) / 32
    centred, plain = (
        get_peft_model(
            copy.deepcopy(base), config_for(["square"], center=center), calibration=[x]
        ).layers["square"].lora_A.detach()
        for center in (True, False)
    )  # fmt: skip
    mean = nn.functional.normalize(x.mean(0), dim=0)
    assert abs(float(plain[0] @ mean)) > 0.99
    assert abs(float(centred[0] @ mean)) < 0.9
    assert_principal(centred, x.double(), True, 4)
    assert_principal(plain, x.double(), False, 4)


@pytest.mark.parametrize("ratio", [1.0, 30.0, 1000.0])
def test_centring_is_accurate_for_a_large_mean(ratio):
    """Activations whose mean is a thousand times their deviation, a known trait of large models."""
    base = Chain()
    x = chain_inputs(400) + ratio * torch.randn(32)
    model = get_peft_model(base, config_for(["square"]), calibration=[x[:200], x[200:]])
    exact = x.double() - x.double().mean(0)
    lora_A = model.layers["square"].lora_A.detach().double()
    best = torch.linalg.svdvals(exact)[:4].square().sum()
    assert (exact @ lora_A.T).square().sum() > 0.999 * best


def test_padding_batch_size_and_order_do_not_matter():
    batches = token_batches()
    garbled = [b | {"input_ids": b["input_ids"] + 5 * (1 - b["attention_mask"])} for b in batches]
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(4)]
    expected = get_peft_model(llama(), config_for(LLAMA_TARGETS), calibration=batches)
    for other in (garbled, rows, batches[::-1]):
        actual = get_peft_model(llama(), config_for(LLAMA_TARGETS), calibration=other)
        for name, layer in expected.layers.items():
            gram = layer.lora_A.T @ layer.lora_A
            projected = actual.layers[name].lora_A.detach()
            assert relative_gap(projected @ gram, projected) < 1e-2, name


def labelled(batches, value=-100):
    """Half of the positions are a prompt: other tokens, and no label."""
    result = []
    for batch in batches:
        ids, labels = batch["input_ids"].clone(), batch["input_ids"].clone()
        half = ids.shape[1] // 2
        labels[:, :half] = value
        labels[batch["attention_mask"] == 0] = value
        result.append(batch | {"input_ids": ids, "labels": labels})
    return result


@pytest.mark.parametrize("value", [-100, 7])
def test_label_mask(value):
    """The effect: with the mask A is the PCA of labelled positions, without it that of all."""
    batches = labelled(token_batches(), value)
    base = llama()
    targets = ["gate_proj", "down_proj"]
    names = [f"model.layers.{i}.mlp.{t}" for i in range(2) for t in targets]

    def run(**options):
        return get_peft_model(
            copy.deepcopy(base), config_for(targets, **options), calibration=batches
        ).layers

    by_label = stacked_inputs(base, names, batches, lambda b: b["labels"] != value)
    by_attention = stacked_inputs(base, names, batches)
    masked = run(label_mask_value=value)
    unmasked = run(label_mask_value=value, use_label_mask=False)
    for name in names:
        assert len(by_label[name]) < len(by_attention[name])
        assert_principal(masked[name].lora_A, by_label[name], True, 4)
        assert_principal(unmasked[name].lora_A, by_attention[name], True, 4)
        difference = masked[name].lora_A @ unmasked[name].lora_A.T
        assert float(torch.linalg.svdvals(difference.detach()).min()) < 0.9


def test_sequence_labels_mask_nothing():
    batches = token_batches()
    with_labels = [b | {"labels": torch.tensor([0, 1, 2, 0])} for b in batches]
    targets = ["query", "intermediate.dense"]
    plain = get_peft_model(bert(), config_for(targets), calibration=batches)
    other = get_peft_model(bert(), config_for(targets), calibration=with_labels)
    for name, layer in plain.layers.items():
        assert torch.equal(layer.lora_A, other.layers[name].lora_A)


def test_whitening():
    """Every component of A x has variance one over the calibration inputs."""
    base, batches = llama(), token_batches()
    model = get_peft_model(
        copy.deepcopy(base), config_for(["o_proj"], whiten=True), calibration=batches
    )
    plain = get_peft_model(copy.deepcopy(base), config_for(["o_proj"]), calibration=batches)
    inputs = stacked_inputs(base, list(model.layers), batches)
    for name, layer in model.layers.items():
        x = inputs[name] - inputs[name].mean(0)
        projected = x @ layer.lora_A.detach().double().T
        covariance = projected.T @ projected / len(x)
        torch.testing.assert_close(covariance, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-3)
        directions = nn.functional.normalize(layer.lora_A.detach(), dim=1)
        torch.testing.assert_close(directions, plain.layers[name].lora_A.detach())


# -- ranks -----------------------------------------------------------------------------------------


class Uneven(nn.Module):
    """Four layers on inputs of very different spectra: flat, steep, of rank one, constant."""

    def __init__(self, constant=True):
        super().__init__()
        self.kinds = ["flat", "steep", "single"] + (["constant"] if constant else [])
        for name in self.kinds:
            self.add_module(name, nn.Linear(32, 32))

    def forward(self, x):
        scales = {
            "flat": torch.ones(32),
            "steep": 0.5 ** torch.arange(32),
            "single": torch.eye(32)[0],
        }
        parts = [self.get_submodule(n)(x * scales[n]) for n in ("flat", "steep", "single")]
        if "constant" in self.kinds:
            parts.append(self.constant(torch.ones_like(x)))
        return sum(parts)


def uneven_inputs():
    return [torch.randn(500, 32, generator=torch.Generator().manual_seed(s)) for s in range(2)]


def expected_ranks(spectra, limit, budget):
    """Pool the first `limit` explained-variance ratios of all layers, take the best `budget`."""
    pool = sorted(
        ((float(v), name) for name, values in spectra.items() for v in values[:limit]),
        reverse=True,
    )[:budget]
    return {name: sum(owner == name for _, owner in pool) for name in spectra}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rho", [1.5, 2.0, 4.0])
def test_redistribution(rho, use_rslora):
    x = torch.cat(uneven_inputs()).double()
    r, alpha = 4, 12
    config = config_for(
        ["flat", "steep", "single"], r=r, rho=rho, lora_alpha=alpha, use_rslora=use_rslora
    )
    model = get_peft_model(Uneven(constant=False), config, calibration=uneven_inputs())
    scales = {
        "flat": torch.ones(32).double(),
        "steep": 0.5 ** torch.arange(32).double(),
        "single": torch.eye(32)[0].double(),
    }
    spectra = {}
    for name, scale in scales.items():
        variances, _ = principal(x * scale, 32, True)
        spectra[name] = variances / variances.sum()
    expected = expected_ranks(spectra, int(r * rho), 3 * r)
    ranks = {name: layer.rank for name, layer in model.layers.items()}
    assert sum(expected.values()) == 3 * r
    assert ranks == {name: rank for name, rank in expected.items() if rank}
    assert len(set(ranks.values())) > 1
    scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
    for name, layer in model.layers.items():
        assert layer.scaling == pytest.approx(scaling)
        target = next(t for t in model.plan.targets if t.name == name)
        grown = layer.rank / r
        assert target.alpha == pytest.approx(alpha * (math.sqrt(grown) if use_rslora else grown))
        assert_principal(layer.lora_A, x * scales[name], True, layer.rank)


def test_layer_without_variance_gets_no_adapter():
    base = Uneven()
    config = config_for(["flat", "steep", "single", "constant"], rho=2.0)
    model = get_peft_model(copy.deepcopy(base), config, calibration=uneven_inputs())
    assert "constant" not in model.layers
    assert type(model.base_model.constant) is nn.Linear
    assert "constant" not in [target.name for target in model.plan.targets]
    assert model.plan.parameters == sum(64 * layer.rank for layer in model.layers.values())
    assert sum(layer.rank for layer in model.layers.values()) == 16
    x = uneven_inputs()[0]
    assert torch.equal(model(x), base(x))
    restored = model.unload()
    assert all(torch.equal(restored.state_dict()[k], v) for k, v in base.state_dict().items())


def test_budget_counts_the_planned_ranks():
    config = config_for(["flat", "steep", "single"], r=4, rho=2.0, rank_pattern={"steep": 6})
    model = get_peft_model(Uneven(constant=False), config, calibration=uneven_inputs())
    assert sum(layer.rank for layer in model.layers.values()) == 4 + 6 + 4
    assert model.layers["steep"].rank <= 12


class Shapes(nn.Module):
    """A cheap and an expensive layer on the same steep inputs, and a middle one on flat inputs."""

    SIZES: ClassVar = {"cheap": 8, "expensive": 200, "middle": 60}

    def __init__(self):
        super().__init__()
        for name, rows in self.SIZES.items():
            self.add_module(name, nn.Linear(32, rows))

    def forward(self, x):
        steep = x * 0.8 ** torch.arange(32)
        return self.cheap(steep).sum() + self.expensive(steep).sum() + self.middle(x).sum()


def test_a_budget_of_parameters_is_kept():
    """Against the greedy choice spelt out: the best ratio that fits, until nothing fits."""
    r, limit = 4, 8
    config = config_for(list(Shapes.SIZES), r=r, rho=2.0, budget="parameters")
    model = get_peft_model(Shapes(), config, calibration=uneven_inputs())
    x = torch.cat(uneven_inputs()).double()
    steep = x * 0.8 ** torch.arange(32).double()
    inputs = {"cheap": steep, "expensive": steep, "middle": x}
    costs = {name: 32 + rows for name, rows in Shapes.SIZES.items()}
    ratios = {}
    for name, seen in inputs.items():
        variances, _ = principal(seen, 32, True)
        ratios[name] = (variances / variances.sum())[:limit].tolist()
    left = r * sum(costs.values())
    ranks = dict.fromkeys(costs, 0)
    while True:
        growing = [n for n in ranks if ranks[n] < limit and costs[n] <= left]
        if not growing:
            break
        best = max(growing, key=lambda n: ratios[n][ranks[n]] / costs[n])
        ranks[best] += 1
        left -= costs[best]
    assert {name: layer.rank for name, layer in model.layers.items()} == {
        name: rank for name, rank in ranks.items() if rank
    }
    assert 0 <= r * sum(costs.values()) - model.plan.parameters < max(costs.values())
    assert len(set(ranks.values())) > 1
    # Of equal sums of ranks the paper's choice has another number of parameters.
    paper = config_for(list(Shapes.SIZES), r=r, rho=2.0)
    by_ranks = get_peft_model(Shapes(), paper, calibration=uneven_inputs())
    assert sum(layer.rank for layer in by_ranks.layers.values()) == 3 * r
    assert by_ranks.plan.parameters != model.plan.parameters


def test_rho_one_keeps_the_ranks_uniform():
    model = get_peft_model(
        Uneven(), config_for(["flat", "steep"], r=5, rho=1.0), calibration=uneven_inputs()
    )
    assert [layer.rank for layer in model.layers.values()] == [5, 5]
    assert [layer.scaling for layer in model.layers.values()] == [8 / 5, 8 / 5]


def test_scaling_follows_the_rank_when_it_is_not_adjusted():
    config = config_for(["flat", "steep"], rho=2.0, adjust_scaling_factors=False)
    model = get_peft_model(Uneven(), config, calibration=uneven_inputs())
    assert len({layer.rank for layer in model.layers.values()}) > 1
    for layer in model.layers.values():
        assert layer.scaling == pytest.approx(8 / layer.rank)


def test_directions_are_exact_whatever_the_other_readers_ask_for():
    """A wide layer, where the partial eigensolver iterates: 8 components first, then 2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 1600, generator=generator) * torch.arange(1, 1601) ** -0.4
    moments = [InputStatistics.of_rows(x) for _ in range(2)]
    moments[1].principal_components(8, True)
    first, second = (m.principal_components(2, True)[1] for m in moments)
    assert torch.equal(first, second)


def test_ipa_is_the_frozen_form():
    """At equal ranks A holds the principal components of the centered inputs, and stays there."""
    batches, base = token_batches(), llama()
    rows = stacked_inputs(base, ["model.layers.0.mlp.down_proj"], batches)
    settings = {"name": "eva_frozen", "rho": 1.0}
    config = LoraConfig(r=4, lora_alpha=1, target_modules=["down_proj"], init_lora_weights=settings)
    model = get_peft_model(base, config, calibration=batches, cache=False)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_B"
    }
    layer = model.layers["model.layers.0.mlp.down_proj"]
    assert layer.scaling == 0.25
    assert_principal(layer.lora_A, *rows.values(), center=True, rank=4)
    start = layer.lora_A.clone()
    model(**batches[0]).logits.square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert torch.equal(layer.lora_A, start)
    assert layer.lora_B.any()


def test_inputs_that_never_vary_are_an_error():
    base = Chain()
    with pytest.raises(ValueError, match=r"no layer's inputs vary.*varied batches"):
        get_peft_model(base, config_for(["square"]), calibration=[torch.ones(30, 32)])
    assert type(base.square) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.5}, r"rho=0\.5 is not supported: must be a finite number >= 1"),
        ({"tau": 0.5}, r"tau=0\.5.*exact"),
        ({"rh0": 2.0}, "unknown option 'rh0'.*'rho'"),
        ({"budget": "rank"}, "budget='rank' is not supported: must be one of ranks, parameters"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(init_lora_weights="eva", eva_config=options)


def test_whitening_leaves_unseen_directions_alone():
    """Three tokens span three directions: the fourth is rounding, and stays of unit length."""
    x = torch.randn(3, 20)
    statistics = LayerStatistics(inputs=InputStatistics.of_rows(x))
    options = EvaOptions(whiten=True, center=False)
    factors = eva(layer_of(torch.zeros(8, 20), 4, 1.0, inputs=statistics.inputs), options)
    assert float(factors.lora_A[3].norm()) == pytest.approx(1.0, abs=1e-4)
    request = LayerRequest(4, (8, 20), statistics, lambda: torch.zeros(8, 20))
    ranks = options.allocate({"a": request})
    assert ranks == {"a": 3}
