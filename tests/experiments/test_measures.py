"""What runs record besides the score, each figure against an independent computation in float64."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from products import chosen
from safetensors.torch import load_file
from scipy import linalg as scipy_linalg
from torch import nn
from torch.nn import functional as F

from experiments.data import load_data
from experiments.errors import ConfigurationError
from experiments.measures.angles import mean_angle, principal_angles
from experiments.measures.fidelity import first_step_error
from experiments.measures.forgetting import pooled_distance, token_divergence
from experiments.measures.intruders import intruder_dimensions
from experiments.measures.originals import spread
from experiments.measures.products import product_norm, update_norm
from experiments.measures.spectra import leading_spectrum, taken
from experiments.measures.updates import is_due
from experiments.models import load_model
from experiments.run.execute import execute
from experiments.run.folder import identify
from experiments.tasks import make_task
from lora_init import LoraConfig, LoraModel, get_peft_model

# -- the mathematics -------------------------------------------------------------------------------


def test_norms_of_products():
    lora_B, lora_A = torch.randn(40, 5), torch.randn(5, 30)
    expected = float((lora_B.double() @ lora_A.double()).norm())
    assert product_norm(lora_B, lora_A) == pytest.approx(expected, rel=1e-12)
    assert product_norm(torch.zeros(4, 2), torch.randn(2, 3)) == 0.0


@pytest.mark.parametrize("change", [1.0, 1e-6])
def test_the_update_is_what_training_changed(change):
    """Also where it is a millionth of the factors: Gram matrices of [B, -B0] would give noise."""
    base = nn.Sequential(nn.Linear(30, 40))
    config = LoraConfig(r=5, lora_alpha=15, target_modules=["0"], init_lora_weights="pissa")
    layer = get_peft_model(base, config).layers["0"]
    assert update_norm(layer) == 0.0
    with torch.no_grad():
        layer.lora_A += change * torch.randn_like(layer.lora_A)
        layer.lora_B += change * torch.randn_like(layer.lora_B)
    after = layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    before = layer.initial_lora_B.double() @ layer.initial_lora_A.double()
    assert update_norm(layer) == pytest.approx(3 * float((after - before).norm()), rel=1e-8)


def test_when_the_update_is_measured():
    assert [step for step in range(1, 131) if is_due(step, 130, 50)] == [50, 100, 130]
    assert [step for step in range(1, 131) if is_due(step, 130, 0)] == [100, 130]
    assert [step for step in range(1, 31) if is_due(step, 30, 0)] == [30]


def test_principal_angles():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    for second in (torch.randn(20, 4, generator=generator), torch.randn(20, 2), first[:, :3]):
        expected = np.rad2deg(np.sort(scipy_linalg.subspace_angles(first, second.double())))
        for pair in ((first, second), (second, first)):
            torch.testing.assert_close(
                principal_angles(*pair), torch.tensor(expected), rtol=0, atol=1e-6
            )


@pytest.mark.parametrize("degrees", [0.0, 1e-7, 1e-3, 44.9, 45.1, 89.999, 90.0])
def test_an_angle_keeps_its_digits(degrees):
    """The arc cosine of a double cannot tell angles below 1e-6 degrees from zero."""
    turned = math.radians(degrees)
    first = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).T
    second = torch.tensor([[math.cos(turned), math.sin(turned), 0.0]], dtype=torch.float64).T
    assert float(principal_angles(first, 7 * second)) == pytest.approx(degrees, rel=1e-9)
    assert mean_angle(first, torch.zeros(3, 1)) is None
    assert mean_angle(torch.zeros(3, 1), second) is None


def test_intruder_dimensions():
    weight = torch.linalg.qr(torch.randn(60, 60))[0] * torch.arange(60, 0, -1.0)
    u = torch.linalg.svd(weight.double())[0].float()
    elsewhere = u.mean(1)  # as far from every singular vector as a vector can be
    elsewhere /= elsewhere.norm()
    new = 200 * torch.outer(elsewhere, torch.randn(60) / 60**0.5)
    stronger = weight + 100 * torch.outer(u[:, 50], torch.linalg.svd(weight)[2][50])
    assert intruder_dimensions(weight, weight, 10) == 0
    assert intruder_dimensions(weight, stronger, 10) == 0  # a small one, made large
    assert intruder_dimensions(weight, weight + new, 10) == 1
    noisy = weight + new + 3 * torch.randn(60, 60)
    tuned = torch.linalg.svd(noisy.double())[0][:, :10]
    expected = sum(float((u.double().T @ column).abs().max()) < 0.5 for column in tuned.T)
    assert intruder_dimensions(weight, noisy, 10) == expected > 1
    assert intruder_dimensions(weight[:, :7], weight[:, :7], 10) == 0  # narrower than directions


def test_what_a_start_takes_of_a_spectrum():
    weight = torch.randn(50, 30)
    s, vt = torch.linalg.svd(weight.double())[1:]
    spectrum = leading_spectrum(weight)
    torch.testing.assert_close(spectrum.values.double(), s, rtol=1e-5, atol=0)
    principal = taken(spectrum, (torch.randn(4, 4, dtype=torch.float64) @ vt[:4]).float())
    expected = torch.tensor([1.0] * 4 + [0.0] * 26, dtype=torch.float64)
    torch.testing.assert_close(principal, expected, rtol=0, atol=1e-5)
    anything = taken(spectrum, torch.randn(4, 30))
    assert float(anything.sum()) == pytest.approx(4)
    assert float(anything.max()) < 1
    assert taken(spectrum, torch.zeros(4, 30)) is None


@pytest.mark.parametrize(
    "method", ["kaiming", "orthogonal", "eva_frozen", "lora_xs", "rlmo", "with an unadapted layer"]
)
def test_the_first_step_is_compared_with_the_gradient(method):
    """Against one step of SGD by autograd, of merged weights; a layer may have no adapter."""
    torch.manual_seed(0)

    class Losses(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16))

        def forward(self, x, labels):
            return SimpleNamespace(loss=F.cross_entropy(self.layers(x), labels))

    base = Losses()
    batch = {"x": torch.randn(40, 12), "labels": torch.randint(0, 16, (40,))}
    names = ["layers.0", "layers.2"]
    adapted = names[:1] if method == "with an unadapted layer" else names
    init = {"name": "eva_frozen", "rho": 1.0} if method == "eva_frozen" else method
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=adapted,
        init_lora_weights="orthogonal" if len(adapted) < 2 else init,
    )  # fmt: skip
    model = get_peft_model(base, config, calibration=[batch])
    found = first_step_error(model, names, [batch], None)

    rate = 1e-6
    weights = {n: base.get_submodule(n) for n in names}
    plain = {
        n: (m.merged_weight() if n in adapted else m.weight).detach().double().requires_grad_()
        for n, m in weights.items()
    }
    x = batch["x"].double()
    for name, module in weights.items():
        bias = (module.base_layer if name in adapted else module).bias.detach().double()
        x = F.linear(torch.tanh(x) if name == names[1] else x, plain[name], bias)
    gradients = torch.autograd.grad(F.cross_entropy(x, batch["labels"]), list(plain.values()))
    moves = []
    for (name, module), gradient in zip(weights.items(), gradients, strict=True):
        if name not in adapted:
            moves.append(torch.zeros_like(gradient))
            continue
        factors = [module.lora_A, module.lora_B, module.lora_core]
        wide = [None if f is None else f.detach().double().requires_grad_() for f in factors]

        def product(lora_A, lora_B, core):
            return 2 * (lora_B if core is None else lora_B @ core) @ lora_A

        trained = [i for i, f in enumerate(factors) if f is not None and f.requires_grad]
        slopes = torch.autograd.grad(
            (product(*wide) * gradient).sum(), [wide[i] for i in trained], materialize_grads=True
        )
        moved = list(wide)
        for i, slope in zip(trained, slopes, strict=True):
            moved[i] = wide[i] - rate * slope
        moves.append((product(*moved) - product(*wide)).detach() / rate)
    step = torch.cat([move.flatten() for move in moves])
    wanted = -torch.cat([gradient.flatten() for gradient in gradients])
    cosine = float(step @ wanted / step.norm() / wanted.norm())
    assert found == pytest.approx((1 - cosine**2) ** 0.5, rel=1e-4)
    assert first_step_error(model, [], [batch], None) is None


def test_forgetting_of_tokens_and_of_texts():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    before, after = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = (x[mask].double().softmax(-1) for x in (before, after))
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(token_divergence(before, after, mask), expected)
    texts = []
    for first, second, valid in zip(before, after, mask, strict=True):
        a, b = first[valid].double().mean(0), second[valid].double().mean(0)
        texts.append(1 - a @ b / (a.norm() * b.norm()))
    torch.testing.assert_close(pooled_distance(before, after, mask), torch.stack(texts))


def test_layers_are_spread_over_blocks_and_kinds():
    names = [f"{block}.{kind}" for block in range(6) for kind in "qkvoud"]
    chosen = spread(names, 4)
    assert len({name[0] for name in chosen}) == 4
    assert len({name[-1] for name in spread(names[:-1], 4)}) > 1
    assert spread(names, None) == spread(names, 99) == names
    assert spread(names, 0) == []


# -- runs ------------------------------------------------------------------------------------------


def rows_of(run, split):
    lines = (identify(run).path / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def reloaded(run):
    """The original base and the trained model of a run, data and task."""
    data = load_data(run.data)

    def load():
        loaded = load_model(
            run.model, task_type=data.task_type, labels=data.labels, head_seed=run.seeds.head
        )
        return loaded.model.eval(), loaded.tokenizer

    base, tokenizer = load()
    trained = LoraModel.from_pretrained(load()[0], identify(run).path / "adapter").eval()
    return base, trained, data, make_task(data.task_type, tokenizer, run.training)


def original_weights(base, model):
    return {name: base.get_submodule(name).weight.detach().double() for name in model.layers}


@pytest.mark.parametrize("method", chosen(["pissa", "loftq"], "pissa"))
def test_a_language_model(configured, tiny_causal, method):
    """Against dense matrices, and the reloaded checkpoint; loftq's base is not the original."""
    steps = ["training.steps=6", "training.learning_rate=1e-2", "measures.update_every=2"]
    run = configured(*tiny_causal, f"init={method}", *steps)
    check_language_model(run, execute(run), method)


@torch.no_grad()
def check_language_model(run, result, method):
    base, trained, data, task = reloaded(run)
    originals = original_weights(base, trained)
    size = math.hypot(*(float(weight.norm()) for weight in originals.values()))

    start, end = result["start"], result["end"]
    init = json.loads((identify(run).path / "init.json").read_text())
    shares = [row["relative_norm"] * float(originals[row["name"]].norm()) for row in init["layers"]]
    assert start["relative_norm"] == pytest.approx(math.hypot(*shares) / size, rel=1e-5)
    for figure in ("norm_A", "norm_B"):
        expected = math.hypot(*(row[figure] for row in init["layers"]))
        assert start[figure] == pytest.approx(expected, rel=1e-6)
    assert start["output_gap"] == result["output_gap"]
    assert start["gradient_norms"] == result["first_step_gradient_norms"]
    assert start["calibration_tokens"] == 0
    assert 0 < start["first_step_error"] < 1

    written = json.loads((identify(run).path / "end.json").read_text())["layers"]
    layers = {row["name"]: row for row in written}
    if method == "pissa":  # there what training changed is the difference of the weights
        changes = {
            name: float((layer.merged_weight().double() - originals[name]).norm())
            for name, layer in trained.layers.items()
        }
        assert end["update_size"] == pytest.approx(math.hypot(*changes.values()) / size, rel=1e-4)
        for name, change in changes.items():
            expected = change / float(originals[name].norm())
            assert layers[name]["update_size"] == pytest.approx(expected, rel=1e-4)
            layer = trained.layers[name]
            angles = scipy_linalg.subspace_angles(
                layer.initial_lora_A.double().T, layer.lora_A.double().T
            )
            assert layers[name]["angle_A"] == pytest.approx(np.rad2deg(angles.mean()), rel=1e-3)
    updates = rows_of(run, "update")
    assert [row["step"] for row in updates] == [2, 4, 6]
    sizes = [row["update_size"] for row in updates]
    assert 0 < sizes[0] < sizes[1] < sizes[2] == end["update_size"]

    total, count = 0.0, 0
    for example in data.validation:
        batch = task.collate([example])
        batch.pop("labels")
        old, new = (model(**batch).logits[0].double() for model in (base, trained))
        divergence = F.softmax(old, -1) * (F.log_softmax(old, -1) - F.log_softmax(new, -1))
        total, count = total + float(divergence.sum()), count + len(old)
    assert end["forgetting"] == pytest.approx(total / count, rel=1e-3)
    assert "KL" in end["forgetting_kind"]

    for name, row in layers.items():
        if row["intruder_dimensions"] is not None:
            old = torch.linalg.svd(originals[name])[0]
            new = torch.linalg.svd(trained.layers[name].merged_weight().double())[0][:, :10]
            expected = int(((old.T @ new).abs().amax(0) < 0.5).sum())
            assert row["intruder_dimensions"] == expected
    counted = [r["intruder_dimensions"] for r in layers.values()]
    counted = [number for number in counted if number is not None]
    assert len(counted) == 8
    assert end["intruder_dimensions"] == pytest.approx(sum(counted) / 8)
    if method == "loftq":
        spectra = json.loads((identify(run).path / "spectra.json").read_text())["layers"]
        values = torch.linalg.svdvals(originals[spectra[0]["name"]])
        assert len(spectra) == 4
        assert spectra[0]["singular_values"] == pytest.approx(values.tolist(), rel=1e-4)


def test_an_encoder(configured, tiny):
    """The head is new: what is compared lies below it. EVA calibrates, and its B starts at zero."""
    run = configured(*tiny, "init=eva", "training.learning_rate=1e-2")
    check_encoder(run, execute(run))


@torch.no_grad()
def check_encoder(run, result):
    base, trained, data, task = reloaded(run)
    distances = []
    for example in data.validation:
        batch = task.collate([example])
        batch.pop("labels")
        old, new = (
            model.base_model(**batch).last_hidden_state[0].double().mean(0)
            for model in (base, trained.get_base_model())
        )
        distances.append(1 - float(old @ new / (old.norm() * new.norm())))
    assert result["end"]["forgetting"] == pytest.approx(np.mean(distances), rel=1e-3)
    assert "cosine" in result["end"]["forgetting_kind"]
    assert result["end"]["angle_A"] > 0
    assert result["end"]["angle_B"] is None
    assert result["start"]["relative_norm"] == result["start"]["norm_B"] == 0.0
    init = json.loads((identify(run).path / "init.json").read_text())
    assert result["start"]["calibration_tokens"] == init["calibration_tokens"] > 0
    assert result["budget"] == {
        "trainable_parameters": trained.plan.parameters,
        "steps": 3,
        "tokens": result["train_tokens"],
    }


@pytest.mark.parametrize("method", chosen(["random", "pissa"], "pissa"))
def test_measures_change_nothing(configured, tiny, method):
    """The same run without them: losses, test and adapter to the bit, also with dropout."""
    settings = [*tiny, f"init={method}", "model.dropout=0.1", "training.steps=6"]
    few = [
        "measures.update_every=0", "measures.forgetting_texts=0", "measures.intruder_layers=0",
        "measures.spectra_layers=0", "measures.first_step_layers=0",
    ]  # fmt: skip
    more = ["measures.update_every=1", "measures.intruder_layers=null", "runtime.rerun=true"]
    outcomes, adapters = [], []
    for overrides in (few, more):
        run = configured(*settings, *overrides)
        result = execute(run)
        adapter = load_file(identify(run).path / "adapter" / "adapter_model.safetensors")
        losses = [(row["loss"], row["grad_norm"]) for row in rows_of(run, "train")]
        outcomes.append((result["run_id"], losses, result["test"]))
        adapters.append(adapter)
        measured = overrides is more
        assert len(rows_of(run, "update")) == (6 if measured else 1)
        assert (result["end"]["forgetting"] is not None) == measured
        assert (result["end"]["intruder_dimensions"] is not None) == measured
        assert (result["start"]["first_step_error"] is not None) == measured
        assert result["end"]["update_size"] > 0
    assert outcomes[0] == outcomes[1]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("measures.update_every=-1", "measures.update_every=-1 .*an integer >= 0"),
        ("measures.intruder_directions=0", "measures.intruder_layers=0"),
        ("measures.first_step_layers=-1", "measures.first_step_layers=-1 .*an integer >= 0"),
    ],
)
def test_bad_settings_are_named(configured, override, message):
    with pytest.raises(ConfigurationError, match=message):
        configured(override)
