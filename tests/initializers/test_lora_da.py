"""lora_da: the formulas of its docstring in float64, dense; and its statistics by autograd."""

import copy

import pytest
import torch
from expert_mixture import Mixture, mixture_rows
from expert_modules import CLASSES, EXPERTS
from measures import relative_gap
from models import Batches, spread_weight
from networks import chain_inputs
from torch import nn

from lora_init import Calibration, LoraConfig, WithLoss, calibrate, get_peft_model, init_factors

SHAPES = [(48, 48), (80, 32), (32, 80)]
RANK = 6


def statistics(rows, columns, tokens=300):
    generator = torch.Generator().manual_seed(3)
    x = chain_inputs(tokens, columns, seed=1)
    g = torch.randn(tokens, rows, generator=generator) * torch.logspace(0, -2, rows)
    return x, g.T @ x / tokens, g.double().square().mean(0)


def reference(x, gradient, y, *, gamma=1024.0, beta=0.03, damping=1e-6, ratio=None, examples=1e5):
    """A up to signs and rotations, as E Eᵀ; B A; and D."""
    moment = x.double().T @ x.double() / len(x)
    inverse = torch.linalg.inv(moment + damping * torch.eye(len(moment)))
    outer = damping if ratio is None else ratio * y.median()
    step = -torch.diag(1 / (y + outer)) @ gradient.double() @ inverse
    sigma = torch.linalg.matrix_norm(step, 2)
    step = step / sigma
    noise = beta * (1 / (y + outer)).sum() / (examples * sigma**2)
    directions = torch.linalg.eigh(-step.T @ step + noise * inverse)[1][:, :RANK]
    projection = directions @ directions.T
    return projection, step @ projection / gamma, step


def factors_of(shape, x, gradient, y, *, alpha=RANK, use_rslora=False, rank=RANK, **options):
    return init_factors(
        torch.zeros(shape), "lora_da", r=rank, lora_alpha=alpha, use_rslora=use_rslora,
        options=options, inputs=x, gradient=gradient, output_moments=y,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"output_damping_ratio": 0.5, "beta": 3.0}])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_formula(shape, options):
    data = statistics(*shape)
    factors = factors_of(shape, *data, **options)
    named = {"ratio": options.get("output_damping_ratio"), "beta": options.get("beta", 0.03)}
    projection, product, step = reference(*data, **named)
    gram = 1024 * factors.lora_A.double() @ factors.lora_A.double().T
    assert relative_gap(gram, torch.eye(RANK)) < 1e-5
    assert relative_gap(1024 * factors.lora_A.T @ factors.lora_A, projection) < 2e-3
    assert relative_gap(factors.lora_B @ factors.lora_A, product) < 2e-3
    energy = (1024 * product).square().sum() / step.square().sum()
    assert factors.metrics["step_energy"] == pytest.approx(float(energy), rel=1e-3)
    assert factors.metrics["damping_ratio"] == pytest.approx(float(data[2].median() / 1e-6))


@pytest.mark.parametrize(
    ("alpha", "use_rslora"), [(6, False), (12, False), (33.96, False), (96, False), (6, True)]
)
def test_the_scaling_is_not_divided_out(alpha, use_rslora):
    data = statistics(32, 48)
    plain = factors_of((32, 48), *data)
    scaled = factors_of((32, 48), *data, alpha=alpha, use_rslora=use_rslora)
    assert torch.equal(plain.lora_B, scaled.lora_B)
    assert torch.equal(plain.lora_A, scaled.lora_A)


@pytest.mark.parametrize("shape", SHAPES)
def test_beta_0_is_the_best_low_rank_part_of_the_step(shape):
    data = statistics(*shape)
    _, _, step = reference(*data)
    left, values, right = torch.linalg.svd(step)
    best = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    factors = factors_of(shape, *data, beta=0.0)
    assert relative_gap(1024 * factors.lora_B @ factors.lora_A, best) < 1e-4


def test_beta_avoids_directions_that_the_inputs_do_not_use():
    shape = (40, 56)
    x, gradient, y = statistics(*shape, tokens=20)  # fewer tokens than inputs
    used = x.double().T @ torch.linalg.pinv(x.double().T)
    factors = factors_of(shape, x, gradient, y, beta=1e6)
    inside = factors.lora_A.double() @ used
    assert relative_gap(inside, factors.lora_A) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_and_a_relative_damping_ignore_the_size_of_the_loss(shape):
    x, gradient, y = statistics(*shape)
    whole = factors_of(shape, x, gradient, y, rank=min(shape))
    assert whole.lora_A.isfinite().all()
    options = {"output_damping_ratio": 0.3}
    plain = factors_of(shape, x, gradient, y, **options)
    scaled = factors_of(shape, x, 1e-3 * gradient, 1e-6 * y, **options)
    product = plain.lora_B @ plain.lora_A
    assert relative_gap(scaled.lora_B @ scaled.lora_A, product) < 1e-2


def test_a_layer_without_a_gradient_starts_with_b_zero():
    x, gradient, y = statistics(24, 32)
    factors = factors_of((24, 32), x, 0 * gradient, 0 * y)
    assert not factors.lora_B.any()
    assert factors.lora_A.isfinite().all()
    assert factors.lora_A.any()


@pytest.mark.parametrize("options", [{"gamma": 0}, {"beta": -1}, {"damping": 0}, {"examples": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"lora_da: {next(iter(options))}=.*must be a finite"):
        LoraConfig(init_lora_weights={"name": "lora_da", **options})


# -- the statistics --------------------------------------------------------------------------------


class Words(nn.Module):
    """A layer that reads masked tokens, and one that reads its outputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)
        self.gradient_checkpointing = False

    def forward(self, x, attention_mask):
        hidden = torch.tanh(self.first(x))
        if self.gradient_checkpointing and self.training:
            return torch.utils.checkpoint.checkpoint(self.second, hidden, use_reentrant=False)
        return self.second(hidden)


def masked_loss(model, batch):
    kept = batch["attention_mask"][..., None]
    return (model(**batch).square() * kept).sum() / kept.sum()


def word_batches():
    torch.manual_seed(1)
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    return [{"x": torch.randn(2, 5, 6), "attention_mask": mask.clone()} for _ in range(3)]


def by_autograd(model, batches):
    """G, C and y of both layers in float64, from hooks of autograd alone."""
    model = copy.deepcopy(model).double()
    gradients, moments, squares, tokens = {}, {}, {}, 0
    for batch in batches:
        batch = {key: value.double() for key, value in batch.items()}
        kept = batch["attention_mask"].bool()
        x, outputs = batch["x"], {}
        outputs["first"] = model.first(x)
        inputs = {"first": x, "second": torch.tanh(outputs["first"])}
        outputs["second"] = model.second(inputs["second"])
        loss = (outputs["second"].square() * kept[..., None]).sum() / kept.sum()
        for name, g in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
            rows, g = inputs[name][kept].detach(), g[kept]
            gradients[name] = gradients.get(name, 0) + g.T @ rows / len(batches)
            moments[name] = moments.get(name, 0) + rows.T @ rows
            squares[name] = squares.get(name, 0) + g.square().sum(0)
        tokens += int(kept.sum())
    mean = [{name: value / tokens for name, value in part.items()} for part in (moments, squares)]
    return gradients, *mean


CONFIG = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights="lora_da")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_pass_collects_all_three_statistics(tmp_path, checkpointing):
    model = Words()
    model.gradient_checkpointing = checkpointing
    passes = []
    model.first.register_forward_hook(lambda *_: passes.append(None))
    found = calibrate(model, CONFIG, WithLoss(word_batches(), masked_loss))
    assert len(passes) == 3
    found.save(tmp_path / "found")
    for calibration in (found, Calibration.load(tmp_path / "found")):
        gradients, moments, squares = by_autograd(model, word_batches())
        for name, layer in calibration.layers.items():
            torch.testing.assert_close(
                layer.gradient.double(), gradients[name], rtol=1e-4, atol=1e-7
            )
            torch.testing.assert_close(
                layer.inputs.second_moment, moments[name], rtol=1e-5, atol=1e-7
            )
            torch.testing.assert_close(layer.output_moments, squares[name], rtol=1e-5, atol=1e-12)


def test_a_generator_is_enough_and_the_cache_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_INIT_CACHE", str(tmp_path))
    data = [WithLoss((batch for batch in word_batches()), masked_loss)]
    models = [get_peft_model(Words(), CONFIG, calibration=each) for each in data]
    found = calibrate(Words(), CONFIG, WithLoss(word_batches(), masked_loss))
    models.append(get_peft_model(Words(), CONFIG, calibration=found))
    for name, layer in models[0].layers.items():
        assert torch.equal(layer.lora_A, models[1].layers[name].lora_A)
        assert torch.equal(layer.lora_B, models[1].layers[name].lora_B)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("gradient", "gradient=None.*lora_da reads"),
        ("output_moments", "output_moments=None.*lora_da reads"),
        ("inputs", "inputs=None.*lora_da reads"),
    ],
)
def test_missing_statistics_are_named(missing, message):
    x, gradient, y = statistics(8, 8)
    given = {"inputs": x, "gradient": gradient, "output_moments": y} | {missing: None}
    with pytest.raises(ValueError, match=message):
        init_factors(spread_weight(8, 8), "lora_da", r=2, **given)


# -- fused experts ---------------------------------------------------------------------------------

LAYOUTS = ("concatenated", "interleaved, transposed, biased", "no gate", "norm after")


def as_linear_layers(model, batches):
    """x, G and y of each expert's matrices in float64; each is a linear layer with its own rows."""
    model = copy.deepcopy(model).double()
    block, layers, rows, squares = model.experts, {}, {}, {}
    has_gate = hasattr(block, "gate_up_proj")
    matrices = ("gate_up_proj" if has_gate else "up_proj", "down_proj")
    for matrix in matrices:
        for expert, stored in enumerate(getattr(block, matrix)):
            weight = stored.T if getattr(block, "is_transposed", False) else stored
            bias = getattr(block, f"{matrix}_bias", None)
            layer = nn.Linear(*weight.T.shape, bias=bias is not None, dtype=torch.float64)
            layer.weight.data.copy_(weight)
            if bias is not None:
                layer.bias.data.copy_(bias[expert])
            layers[f"experts.{matrix}.{expert}"] = layer
    for x in batches:
        hidden = model.entry(x.double())
        indices, scores = model.routing(hidden)
        total, outputs = torch.zeros_like(hidden), {}
        for expert in range(EXPERTS):
            token, place = torch.where(indices == expert)
            states = hidden[token]
            for matrix in matrices:
                name = f"experts.{matrix}.{expert}"
                rows.setdefault(name, []).append(states.detach())
                outputs[name] = states = layers[name](states)
                if matrix != "down_proj":
                    states = block._apply_gate(states) if has_gate else block.act_fn(states)
            if getattr(block, "has_post_expert_norm", False):
                states = block.post_expert_norm(states)
            total = total.index_add(0, token, states * scores[token, place, None])
        [states.retain_grad() for states in outputs.values()]
        total.square().mean().backward()
        for name, states in outputs.items():
            squares[name] = squares.get(name, 0) + states.grad.square().sum(0)
    data = {}
    for name, layer in layers.items():
        x = torch.cat(rows[name])
        data[name] = x, layer.weight.grad / len(batches), squares[name] / len(x)
    return data


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("layout", [one for one in LAYOUTS if one in CLASSES])
def test_the_factors_of_an_expert_are_those_of_a_linear_layer_with_its_rows(
    layout, implementation, tmp_path
):
    model, batches = Mixture(layout), mixture_rows(size=200)
    model.experts.config._experts_implementation = implementation
    data = as_linear_layers(model, batches)
    # With `damping` alone, y of a mean loss would not be seen in the factors.
    config = LoraConfig(
        r=RANK,
        init_lora_weights={"name": "lora_da", "output_damping_ratio": 0.5, "beta": 3.0},
        target_parameters=sorted({name.rpartition(".")[0] for name in data}),
    )
    found = calibrate(model, config, Batches(batches))
    found.save(tmp_path / "found")
    sources = {"passed": found, "saved": Calibration.load(tmp_path / "found")}
    sources["collected"] = Batches(batches)
    loras = {
        key: get_peft_model(copy.deepcopy(model), config, calibration=one, cache=False)
        for key, one in sources.items()
    }
    for name, own in data.items():
        assert len(own[0]) >= 2 * own[0].shape[1]
        parameter, _, expert = name.rpartition(".")
        starts = {}
        for key, lora in loras.items():
            layer = lora.layers[parameter]
            starts[key] = [f[int(expert)].detach() for f in (layer.lora_A, layer.lora_B)]
        for start in starts.values():
            assert all(map(torch.equal, start, starts["collected"]))
        lora_A, lora_B = starts["collected"]
        projection, product, _ = reference(*own, ratio=0.5, beta=3.0)
        assert relative_gap(1024 * lora_A.T @ lora_A, projection) < 2e-3
        assert relative_gap(lora_B @ lora_A, product) < 2e-3
