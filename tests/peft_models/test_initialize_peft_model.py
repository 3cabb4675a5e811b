"""Our methods on live PEFT models: the factors, the files, restoring, and Trainer."""

import contextlib
import copy
import json
import pickle
import subprocess
import sys
import textwrap
import warnings
from itertools import product
from pathlib import Path

import peft
import pytest
import torch
from measures import EPSILON, assert_gap, assert_unchanged, logits, snapshot, train
from methods import SPECS, behavior, handling
from models import (
    Batches,
    ConvTower,
    bert,
    data_of,
    llama,
    spread_weight,
    token_batches,
    tower_batches,
)
from networks import Case
from packing import kept_plain
from products import chosen, every_value, thinned
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from uniform import uniform

from lora_init import (
    Factors,
    LoraConfig,
    LoraModel,
    get_peft_model,
    initialize_peft_model,
    load_peft_checkpoint,
    register_initializer,
    registry,
    restore_peft_model,
    save_peft_model,
)
from lora_init.initializers.pissa import PissaOptions
from lora_init.peft_models import apply
from lora_init.peft_models.layers import adapted_layers
from lora_init.weights.kinds import FORMATS, oriented_weight

pytestmark = pytest.mark.sampled(4)

ROOT = Path(__file__).resolve().parents[2]
RANK = 4
FLOAT_KINDS = ("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d")
KINDS = (*FLOAT_KINDS, "Linear4bit", "Linear8bitLt")


class Convolutions(nn.Module):
    """The convolutions that PEFT supports: padded, strided, without bias; not dilated."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.padded = nn.Conv2d(4, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(0, 1), bias=False)
        for module in (self.padded, self.strided):
            weight = spread_weight(module.out_channels, module.weight[0].numel(), generator)
            with torch.no_grad():
                module.weight.copy_(weight.view(module.weight.shape))

    def forward(self, x):
        return self.strided(torch.tanh(self.padded(x)))


def network(kind):
    """A base with one module type, its targets, inputs, calibration data and original weights."""
    if kind in ("Conv1d", "Conv3d"):
        inputs = Batches(batch["x"] for batch in tower_batches(int(kind[4])))
        return ConvTower(int(kind[4])), ["first", "second"], inputs[0], inputs, None
    if kind == "Conv2d":
        inputs = Batches(torch.randn(6, 4, 6, 7, generator=torch.Generator().manual_seed(s))
                         for s in range(3))  # fmt: skip
        return Convolutions().eval(), ["padded", "strided"], inputs[0], inputs, None
    case = Case(kind)
    base = kept_plain(case.build()).eval()  # a repacked weight is another one
    if case.packed:
        setattr(base, f"is_loaded_in_{kind[6]}bit", True)  # by which PEFT finds packed layers
    return base, list(case.shapes), case.inputs(), case.calibration(), case.originals()


def wrapped(base, targets, **settings):
    settings = {"r": RANK, "lora_alpha": 2 * RANK} | settings
    config = peft.LoraConfig(target_modules=targets, **settings)
    return peft.get_peft_model(copy.deepcopy(base), config).eval()


def start(peft_model, method, batches=None, **settings):
    calibration = data_of(SPECS[method], batches)
    return initialize_peft_model(peft_model, method, calibration=calibration, **settings)


def of_language(method="pissa", base=None, *, targets="all-linear", **settings):
    """A PEFT llama, initialized and trained a little."""
    model = wrapped(base or llama(), targets, **settings)
    start(model, method, token_batches())
    return train(model)


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def growth(layers, base):
    """max(1, ‖s B0 A0‖ / ‖W‖), the factor in the promised tolerances."""
    ratios = [1.0]
    for layer in layers:
        weight = oriented_weight(base.get_submodule(layer.name)).double()
        product = layer.scaling * layer.start.initial_B.double() @ layer.start.initial_A.double()
        ratios.append(float(product.norm() / weight.norm()))
    return max(ratios)


def supports(method, kind):
    return kind in SPECS[method].module_types


CELLS = [
    (method, kind)
    for method in SPECS
    for kind in KINDS
    if supports(method, kind) and not SPECS[method].has_core
]


def one_of(kind):
    """The kind, or "convolution" for each of them: they share one implementation."""
    return "convolution" if FORMATS[kind].operation == "convolution" else kind


FEATURES = (
    lambda method, kind: behavior(method),
    lambda method, kind: kind,
    lambda method, kind: (handling(method), one_of(kind)),
)


# -- step 0 and restoring --------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "kind"), thinned(CELLS, *FEATURES))
def test_the_factors_are_ours_and_restoring_undoes_them(method, kind):
    spec, kept = SPECS[method], uniform(method)
    base, targets, x, batches, originals = network(kind)
    originals = originals if spec.base == "replace" else None
    model = wrapped(base, targets)
    before, expected = snapshot(model), outputs(model, x)
    parameters = dict(model.named_parameters())
    report = start(model, method, batches, original_weights=originals, options=kept or None)

    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=targets,
        init_lora_weights={"name": method, **kept},
    )
    calibration = data_of(spec, batches)
    ours = get_peft_model(
        copy.deepcopy(base), config, calibration=calibration, original_weights=originals
    )
    layers = adapted_layers(model, "default")
    assert [layer.name for layer in layers] == targets == [row.name for row in report.layers]
    for layer, row in zip(layers, report.layers, strict=True):
        assert torch.equal(layer.matrix("lora_A"), ours.layers[layer.name].lora_A)
        assert torch.equal(layer.matrix("lora_B"), ours.layers[layer.name].lora_B)
        assert not layer.base.weight.requires_grad
        weight = oriented_weight(base.get_submodule(layer.name))
        product = layer.scaling * layer.matrix("lora_B") @ layer.matrix("lora_A")
        if spec.base == "subtract":
            assert row.base == ours.layers[layer.name].base_state
            present = oriented_weight(layer.base) + product * (row.base == "edited")
            error = float((weight - present).norm() / weight.norm())
            assert row.details["step_0_error"] == pytest.approx(error, rel=1e-3, abs=1e-8)
            assert error < 1e-7
        if spec.base == "replace":
            original = weight if originals is None else originals[f"{layer.name}.weight"]
            error = float((original - oriented_weight(layer.base) - product).norm())
            assert row.error == pytest.approx(error / float(original.norm()), rel=1e-3)
            assert torch.equal(
                oriented_weight(layer.base), oriented_weight(ours.layers[layer.name].base_layer)
            )
    assert all(parameters[name] is value for name, value in model.named_parameters() if "lora_"
               in name)  # fmt: skip

    exact = 2 * EPSILON[torch.float32] * growth(layers, base)
    if spec.preserves_output:
        assert_gap(outputs(model, x), expected, exact)
    train(model)
    if spec.base != "replace":
        with model.disable_adapter():
            assert_gap(outputs(model, x), expected, exact)
    restore_peft_model(model)
    if spec.base == "subtract" and kind in FLOAT_KINDS:
        for name in targets:
            after = oriented_weight(model.base_model.model.get_submodule(name).base_layer)
            weight = oriented_weight(base.get_submodule(name))
            assert (after - weight).abs().max() <= 1e-6 * weight.abs().max()
        before["state"] |= {k: v for k, v in model.state_dict().items() if "base_layer" in k}
    assert_unchanged(model, before)
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize(
    ("method", "use_rslora", "use_dora"),
    thinned(
        list(product(["kaiming", "pissa", "olora", "eva"], [False, True], [False, True])),
        lambda method, use_rslora, use_dora: method,
        lambda method, use_rslora, use_dora: (handling(method), use_dora),
        lambda method, use_rslora, use_dora: (use_rslora, use_dora),
    ),
)
def test_scalings_patterns_and_dora(method, use_rslora, use_dora, tmp_path):
    base, batches = llama(), token_batches()
    model = wrapped(
        base,
        ["q_proj", "v_proj", "down_proj"],
        use_rslora=use_rslora,
        use_dora=use_dora,
        rank_pattern={"q_proj": 2, r"layers\.1\..*v_proj": 6},
        alpha_pattern={"layers.0.mlp.down_proj": 1.5},
        modules_to_save=["lm_head"],
    )
    report = start(model, method, batches)
    assert len({round(row.scaling, 6) for row in report.layers}) == 4
    layers = adapted_layers(model, "default")
    for layer, row in zip(layers, report.layers, strict=True):
        assert (layer.rank, layer.alpha, layer.scaling) == (row.rank, row.alpha, row.scaling)
    tolerance = 1e-5 * growth(layers, base)
    assert_gap(logits(model, batches), logits(base, batches), tolerance)
    assert_reloads(train(model), base, tmp_path, 10 * tolerance)


@pytest.mark.parametrize("kind", ["Embedding", "Conv2d", "Conv1D"])
@pytest.mark.parametrize("method", ["kaiming", "pissa"])
def test_dora_on_other_layers(method, kind):
    base, targets, x, batches, _ = network(kind)
    model = wrapped(base, targets, use_dora=True)
    start(model, method, batches)
    assert_gap(outputs(model, x), outputs(base, x), 1e-5)
    for layer in adapted_layers(model, "default"):
        weight = oriented_weight(base.get_submodule(layer.name))
        torch.testing.assert_close(layer.magnitude.flatten(), weight.norm(dim=1))


def test_dora_with_dropout_edits_a_16_bit_base():
    """PEFT reads the base's weight, so the weight must hold the difference."""
    base = llama().bfloat16()
    model = wrapped(base, "all-linear", use_dora=True, lora_dropout=0.1)
    with pytest.warns(UserWarning, match="lora_dropout=0.1 with pissa"):
        report = start(model, "pissa")
    errors = [row.details["step_0_error"] for row in report.layers]
    assert all(1e-4 < error < 2**-8 for error in errors)
    restore_peft_model(model)
    assert same_weights(model, base)
    start(model, "kaiming")


def by_name(model, adapter="default"):
    return {layer.name: layer for layer in adapted_layers(model, adapter)}


def same_weights(model, base):
    return all(
        torch.equal(layer.base.weight, base.get_submodule(name).weight)
        for name, layer in by_name(model).items()
    )


def test_a_second_call_equals_the_first():
    """Also after another method that changed ranks or dropped layers."""
    base, batches = llama(), token_batches()
    once = wrapped(base, "all-linear")
    start(once, "pissa")
    model = wrapped(base, "all-linear")
    for method in ("eva", "loftq", "pissa", "pissa"):
        start(model, method, batches, options={"rho": 4.0} if method == "eva" else None)
    for name, layer in by_name(model).items():
        other = by_name(once)[name]
        for which in ("lora_A", "lora_B"):
            torch.testing.assert_close(layer.matrix(which), other.matrix(which))
        torch.testing.assert_close(layer.base.weight, other.base.weight, rtol=0, atol=1e-6)
    assert_gap(logits(model, batches), logits(base, batches), 1e-5)


@pytest.mark.parametrize(
    ("method", "first"),
    every_value(product(["pissa", "eva", "loftq"], [None, "pissa", "loftq"]), 2),
)
def test_nothing_is_changed_when_it_fails_in_the_middle(method, first, monkeypatch):
    base, batches = llama(), token_batches()
    model = wrapped(base, "all-linear", modules_to_save=["lm_head"])
    if first is not None:
        start(model, first, batches)
    expected = logits(model, batches)
    before, config = snapshot(model), copy.deepcopy(model.peft_config["default"])
    calls = []

    def failing(layer, plan, done, inner=apply._freeze):
        calls.append(layer.name)
        if len(calls) == 4:
            raise MemoryError("no memory")
        inner(layer, plan, done)

    monkeypatch.setattr(apply, "_freeze", failing)
    with pytest.raises(MemoryError):
        start(model, method, batches)
    assert len(calls) == 4
    assert model.peft_config["default"] == config
    assert ("save_pretrained" in vars(model)) == (first is not None)
    # A subtraction is taken back by adding: to the last bits.
    for name, value in before["state"].items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6)
    before["state"] = model.state_dict()
    assert_unchanged(model, before)
    assert_gap(logits(model, batches), expected, 1e-5)


# -- EVA's ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use_rslora", chosen([False, True], True), ids={False: "plain", True: "rslora"}.get
)
def test_eva_moves_ranks(use_rslora, tmp_path):
    base, batches = llama(), token_batches()
    with torch.no_grad():  # so that the inputs of the next layer do not vary
        base.model.layers[1].mlp.up_proj.weight.zero_()
    model = wrapped(base, "all-linear", use_rslora=use_rslora, r=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    layers = by_name(model)
    scalings = {name: layer.scaling for name, layer in layers.items()}
    report = start(model, "eva", batches, options={"rho": 8.0})
    config = LoraConfig(
        r=2, lora_alpha=8, use_rslora=use_rslora, target_modules="all-linear",
        init_lora_weights={"name": "eva", "rho": 8.0},
    )  # fmt: skip
    ours = get_peft_model(copy.deepcopy(base), config, calibration=batches)
    ranks = {name: layer.rank for name, layer in ours.layers.items()}
    assert {row.name: row.rank for row in report.layers} == ranks
    assert len(set(ranks.values())) > 2
    assert layers.keys() - ranks.keys() == {"model.layers.1.mlp.down_proj"}
    now = by_name(model)
    assert {name: layer.rank for name, layer in now.items()} == ranks
    for name, layer in now.items():
        assert layer.scaling == pytest.approx(scalings[name])
        assert torch.equal(layer.matrix("lora_A"), ours.layers[name].lora_A)
        assert layer.module.lora_A["default"].out_features == ranks[name]
        assert layer.factor("lora_A") is layers[name].factor("lora_A")
    assert type(model.base_model.model.model.layers[1].mlp.down_proj) is nn.Linear
    # An optimizer that was built too early, but has not stepped, still trains the right tensors.
    train_steps(model, batches, optimizer, steps=2)
    assert all(bool(layer.matrix("lora_B").any()) for layer in now.values())
    assert_reloads(model, base, tmp_path, 1e-6)

    resumed = wrapped(base, "all-linear", use_rslora=use_rslora, r=2)
    load_peft_checkpoint(resumed, tmp_path)
    assert {name: layer.rank for name, layer in by_name(resumed).items()} == ranks
    assert resumed.peft_config["default"].rank_pattern
    assert_gap(logits(resumed, batches), logits(model, batches), 0.0)
    restore_peft_model(resumed)
    assert {layer.rank for layer in by_name(resumed).values()} == {2}
    assert len(by_name(resumed)) == len(layers)
    assert resumed.peft_config["default"].target_modules == wrapped(base, "all-linear").peft_config[
        "default"
    ].target_modules  # fmt: skip


def train_steps(model, batches, optimizer, steps):
    model.train()
    for step in range(steps):
        batch = batches[step % len(batches)]
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    optimizer.zero_grad()


# -- files -----------------------------------------------------------------------------------------


def assert_reloads(model, base, folder, tolerance):
    """What is saved is right on the original base: in PEFT, here, and as a checkpoint."""
    batches = token_batches()
    expected = logits(model, batches)
    model.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert_gap(logits(loaded, batches), expected, tolerance)
    ours = LoraModel.from_pretrained(copy.deepcopy(base), folder)
    assert_gap(logits(ours, batches), expected, tolerance)
    return loaded


FILES = [
    (method, kind)
    for method, kind in CELLS
    if kind in FLOAT_KINDS or (kind in KINDS[-2:] and method in ("pissa", "loftq"))
]


@pytest.mark.parametrize(("method", "kind"), thinned(FILES, *FEATURES))
def test_saved_files(method, kind, tmp_path):
    spec = SPECS[method]
    base, targets, x, batches, originals = network(kind)
    originals = originals if spec.base == "replace" else None
    model = wrapped(base, targets)
    start(model, method, batches, original_weights=originals)
    expected = outputs(train(model), x)
    layers = by_name(model)
    save_peft_model(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    plain = spec.base != "replace"
    if plain:
        assert config["init_lora_weights"] is True
        assert config["r"] == (2 * RANK if spec.base == "subtract" else RANK)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        tolerance = 1e-6 if spec.base == "keep" else 1e-5 * growth(layers.values(), base)
        assert_gap(outputs(loaded, x), expected, tolerance)
        if spec.base == "subtract":
            with pytest.raises(RuntimeError, match="size mismatch"):
                wrapped(base, targets).load_adapter(tmp_path, "default", is_trainable=True)
        keys = set(load_file(tmp_path / "adapter_model.safetensors"))
        assert all(".lora_" in key for key in keys), keys
    else:
        with pytest.raises(KeyError, match="load_peft_checkpoint"):
            peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        with pytest.raises(RuntimeError, match="size mismatch"):  # as Trainer would resume
            wrapped(base, targets).load_adapter(tmp_path, "default", is_trainable=True)
    ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path, original_weights=originals)
    assert_gap(outputs(ours.eval(), x), expected, 1e-5)

    resumed = wrapped(base, targets)
    load_peft_checkpoint(resumed, tmp_path, original_weights=originals)
    assert torch.equal(outputs(resumed.eval(), x), expected)
    for name, layer in by_name(resumed).items():
        assert layer.rank == layers[name].rank
        assert torch.equal(oriented_weight(layer.base), oriented_weight(layers[name].base))
        if spec.base == "subtract":
            assert torch.equal(layer.start.initial_A, layers[name].start.initial_A)
    save_peft_model(resumed, tmp_path / "again")
    for file in tmp_path.glob("*.safetensors"):
        assert_same_file(file, tmp_path / "again" / file.name)


def assert_same_file(first, second):
    with safe_open(first, "pt") as one, safe_open(second, "pt") as other:
        assert one.metadata() == other.metadata()
    tensors = load_file(second)
    for key, value in load_file(first).items():
        assert torch.equal(value, tensors.pop(key)), key
    assert not tensors


@pytest.mark.parametrize(
    ("bias", "lora_bias"), every_value(product(["none", "all", "lora_only"], [False, True]), 2)
)
def test_heads_and_biases(bias, lora_bias, tmp_path):
    base, batches = bert(), token_batches()
    model = of_language(
        "pissa",
        base,
        targets=["query", "value", "intermediate.dense"],
        task_type="SEQ_CLS",
        bias=bias,
        lora_bias=lora_bias,
    )
    expected = logits(model, batches)
    loaded = assert_reloads(model, base, tmp_path, 1e-5)
    assert type(loaded) is peft.PeftModelForSequenceClassification
    resumed = wrapped(
        base, ["query", "value", "intermediate.dense"], task_type="SEQ_CLS", bias=bias,
        lora_bias=lora_bias,
    )  # fmt: skip
    load_peft_checkpoint(resumed, tmp_path)
    assert_gap(logits(resumed, batches), expected, 0.0)


def test_other_adapters_of_a_changed_base(tmp_path):
    """TRL's reference is a second adapter, a copy of the first one."""
    base, batches = llama(), token_batches()
    model = wrapped(base, ["q_proj", "v_proj"])
    start(model, "pissa")
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            twin = model.get_parameter(name.replace(".default.", ".ref."))
            twin.data.copy_(parameter.data)
    train(model)
    with model.disable_adapter():
        assert_gap(logits(model, batches), logits(base, batches), 1e-5)
    model.set_adapter("ref")
    assert_gap(logits(model, batches), logits(base, batches), 1e-5)
    model.set_adapter("default")
    expected = logits(model, batches)
    model.save_pretrained(tmp_path)
    for folder, right in ((tmp_path, expected), (tmp_path / "ref", logits(base, batches))):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        assert_gap(logits(loaded, batches), right, 1e-5)
    train(model, seed=6)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    model.load_adapter(tmp_path / "ref", "ref")
    model.set_adapter("default")
    assert_gap(logits(model, batches), expected, 0.0)
    with pytest.raises(ValueError, match="'ref' was trained on the base.*Delete 'ref' first"):
        model.delete_adapter("default")

    model.add_adapter("wider", peft.LoraConfig(r=8, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="'wider' has other layers, ranks or scalings"):
        model.save_pretrained(tmp_path)
    save_peft_model(model, tmp_path)


# -- PEFT's own methods on a changed base ----------------------------------------------------------


def test_a_copy_is_guarded_by_itself(tmp_path):
    base, batches = llama(), token_batches()
    model = of_language("pissa", base)
    expected = logits(model, batches)
    twins = {"copy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
    restore_peft_model(model)
    for name, twin in twins.items():
        assert_gap(logits(twin, batches), expected, 0.0)
        assert_reloads(twin, base, tmp_path / name, 1e-5)
        with twin.disable_adapter():
            assert_gap(logits(twin, batches), logits(base, batches), 1e-5)
        restore_peft_model(twin)
        assert_gap(logits(twin, batches), logits(base, batches), 1e-5)


def test_a_base_that_was_not_kept_is_named():
    model = wrapped(llama(), ["q_proj"])
    start(model, "loftq", keep_original=False)
    for call in (restore_peft_model, lambda m: start(m, "pissa"), lambda m: m.unload()):
        before = snapshot(model)
        with pytest.raises(RuntimeError, match="q_proj' was replaced.*keep_original=True"):
            call(model)
        assert_unchanged(model, before)


def test_plain_adapters_are_not_loaded_onto_a_changed_base(tmp_path):
    base = llama()
    train(wrapped(base, "all-linear")).save_pretrained(tmp_path / "plain")
    of_language("pissa", base).save_pretrained(tmp_path / "ours")
    model = of_language("pissa", base)
    before = snapshot(model)
    for folder, name in (("plain", "default"), ("plain", "new"), ("ours", "new")):
        with pytest.raises(ValueError, match="is for the original one. Call restore_peft_model"):
            model.load_adapter(tmp_path / folder, name)
    assert_unchanged(model, before)


def test_a_checkpoint_of_another_start_moves_the_base(tmp_path):
    base, batches = llama(), token_batches()
    trained = of_language("corda", base)
    trained.save_pretrained(tmp_path)
    for method in ("pissa", "corda"):
        model = wrapped(base, "all-linear")
        initialize_peft_model(model, method, calibration=batches[:1])
        model.load_adapter(tmp_path, "default", is_trainable=True)
        assert_gap(logits(model, batches), logits(trained, batches), 1e-5)
        restore_peft_model(model)
        assert_gap(logits(model, batches), logits(base, batches), 1e-5)


def test_unsupported_files_are_refused(tmp_path):
    model = of_language("pissa")
    with pytest.raises(ValueError, match="safe_serialization=False"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="x")
    assert not list(tmp_path.iterdir())


# -- Trainer ---------------------------------------------------------------------------------------

PROGRAM = """
    import sys
    from pathlib import Path

    import peft
    import torch
    from transformers import Trainer, TrainingArguments

    sys.path.insert(0, "tests/support")
    from models import llama, token_batches

    from lora_init import initialize_peft_model, load_peft_checkpoint

    torch.set_num_threads(1)

    def examples():
        return [
            {"input_ids": ids, "labels": ids}
            for batch in token_batches(6, padded=False) for ids in batch["input_ids"]
        ]

    def run(method, folder, resume):
        config = peft.LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=["lm_head"]
        )
        model = peft.get_peft_model(llama(), config)
        checkpoint = f"{folder}/{method}/checkpoint-3"
        if resume and method != "olora":
            load_peft_checkpoint(model, checkpoint)
        else:
            calibration = token_batches() if method == "eva" else None
            initialize_peft_model(model, method, calibration=calibration)
        arguments = TrainingArguments(
            f"{folder}/{method}", max_steps=6, save_steps=3, logging_steps=1, learning_rate=1e-2,
            per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
            save_only_model=False, dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=examples())
        trainer.train(resume_from_checkpoint=checkpoint if resume else None)
        return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
"""


@pytest.mark.exhaustive
def test_trainer_resumes_in_a_new_process(tmp_path):
    """Re-initialized by the same line (olora), or without it, from the checkpoint alone."""
    pytest.importorskip("accelerate")
    methods = ["pissa", "olora", "eva", "loftq"]
    namespace = {}
    exec(textwrap.dedent(PROGRAM), namespace)
    losses, models = {}, {}
    with contextlib.redirect_stdout(None):
        for method in methods:
            models[method], losses[method] = namespace["run"](method, tmp_path, False)
    program = textwrap.dedent(PROGRAM) + textwrap.dedent(f"""
        import json
        losses = {{m: run(m, {str(tmp_path)!r}, True)[1] for m in {methods!r}}}
        Path({str(tmp_path / "losses.json")!r}).write_text(json.dumps(losses))
    """)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    resumed = json.loads((tmp_path / "losses.json").read_text())
    for method in methods:
        assert losses[method][-1] < losses[method][0]
        assert resumed[method][-3:] == losses[method][-3:], method
    # A checkpoint of a subtracting method is a plain adapter at the same time.
    batches = token_batches()
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "pissa" / "checkpoint-6")
    assert_gap(logits(loaded, batches), logits(models["pissa"], batches), 1e-5)


# -- options, frozen factors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("pissa_niter_4", None),
        ("pissa", {"niter": 4}),
        ("pissa", PissaOptions(niter=4)),
        ({"name": "pissa", "niter": 4}, None),
        (PissaOptions(niter=4), None),
    ],
)
def test_all_spellings_of_a_method(method, options):
    model = wrapped(llama(), ["q_proj"])
    report = initialize_peft_model(model, method, options=options, seed=3)
    assert report.method == "pissa"
    assert report.options["niter"] == 4
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj"], init_lora_weights="pissa_niter_4"
    )
    ours = get_peft_model(llama(), config, seed=3)
    for name, layer in by_name(model).items():
        assert torch.equal(layer.matrix("lora_A"), ours.layers[name].lora_A)


def test_frozen_factors_stay_frozen(monkeypatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))

    class FrozenOptions(registry.Options):
        frozen = ("lora_B",)

    @register_initializer("half", options=FrozenOptions)
    def half(layer, options):
        rows, columns = layer.shape
        return Factors(torch.zeros(layer.rank, columns), torch.ones(rows, layer.rank))

    model = wrapped(llama(), ["q_proj"])
    initialize_peft_model(model, "half")
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    for layer in by_name(model).values():
        assert layer.factor("lora_A").requires_grad
        assert not layer.factor("lora_B").requires_grad
    restore_peft_model(model)
    model.set_adapter("default")
    assert all(layer.factor("lora_B").requires_grad for layer in by_name(model).values())


# -- errors ----------------------------------------------------------------------------------------


def refused(model, error, match, method="pissa", **settings):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        initialize_peft_model(model, method, **settings)
    assert_unchanged(model, before)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="LlamaForCausalLM is not supported.*Pass what peft"):
        initialize_peft_model(llama(), "pissa")
    ours = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="lora_init.model.lora_model.LoraModel"):
        initialize_peft_model(ours, "pissa")
    model = wrapped(llama(), ["q_proj"])
    refused(model, ValueError, "adapter_name='other' is not.* one of default", adapter_name="other")
    ia3 = peft.get_peft_model(
        llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    refused(ia3, TypeError, "'default' has peft_type=IA3")
    with pytest.raises(ValueError, match="was not initialized by initialize_peft_model"):
        restore_peft_model(model)


def test_wrong_settings_are_refused():
    model = wrapped(llama(), ["q_proj"])
    refused(model, ValueError, "'pisa' is not a registered.*did you mean 'pissa'", "pisa")
    refused(model, ValueError, "unknown option 'iter'", options={"iter": 1})
    refused(model, TypeError, "must be a mapping or LoftqOptions", "loftq", options=PissaOptions())
    refused(model, TypeError, "options go with a method's name", {"name": "pissa"}, options={})
    refused(model, ValueError, "'eva' needs calibration data", "eva")
    refused(model, ValueError, "no target is quantized", original_weights={})
    start(model, "pissa")
    refused(model, ValueError, "'eva' needs calibration data", "eva")


def test_unsupported_ranks_and_layers_are_refused():
    model = wrapped(llama(), ["q_proj"], r=3)
    refused(model, ValueError, "q_proj'.*r must be even", "orthogonal")
    words = wrapped(Case("Embedding").build(), ["words"])
    refused(words, TypeError, "'words' is a Embedding.*olora does not support", "olora")
    kasa = wrapped(llama(), ["q_proj"], arrow_config=None, alora_invocation_tokens=[1])
    refused(kasa, TypeError, "adapted by PEFT's ALoraLinearVariant", "kaiming")


def test_replacing_tied_weights_is_refused():
    model = wrapped(llama(tied=True), ["lm_head", "q_proj"])
    refused(model, ValueError, "'lm_head' shares its weight with 'model.embed_tokens", "loftq")


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_shared_modules_and_factors_are_refused(method):
    both = wrapped(llama(tied=True), ["lm_head", "embed_tokens"], ensure_weight_tying=True)
    refused(both, ValueError, "share their factors.*ensure_weight_tying=False", "gaussian")

    twice = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    twice.append(twice[0])
    refused(wrapped(twice, ["0"]), ValueError, "'0' shares its weight with '2'", method)


def test_tied_weights_are_subtracted_in_the_forward_pass(tmp_path):
    base, batches = llama(tied=True), token_batches()
    model = wrapped(base, ["lm_head", "q_proj"])
    report = start(model, "pissa")
    assert {row.name: row.base for row in report.layers}["lm_head"] == "in_forward"
    assert_gap(logits(model, batches), logits(base, batches), 1e-5)
    save_peft_model(train(model), tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_gap(logits(loaded, batches), logits(model, batches), 1e-5)
    restore_peft_model(model)
    assert_gap(logits(model, batches), logits(base, batches), 1e-5)


def test_convolutions_that_peft_computes_differently_are_refused():
    case = Case("Conv2d")
    for name, expected in (("strided", "circular"), ("dilated", "reflect")):
        model = wrapped(case.build(), [name])
        refused(model, TypeError, f"{name}' is a Conv2d with dilation.*{expected}")
        start(model, "kaiming")


def test_a_trained_adapter_is_not_overwritten():
    batches = token_batches()
    model = wrapped(llama(), ["q_proj"])
    model(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    refused(model, ValueError, "has gradients, in 'model.layers.0.*before the optimizer is built")
    model.zero_grad()
    train(model)
    refused(model, ValueError, "trained or loaded already: the factors of 'model.layers.0")
    model = of_language("pissa")
    refused(model, ValueError, "trained or loaded already.*restore_peft_model", "olora")
    restore_peft_model(model)
    start(model, "olora")


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_a_base_that_peft_has_changed_is_refused(init):
    model = wrapped(llama(), ["q_proj"], init_lora_weights=init)
    refused(model, ValueError, f"init_lora_weights='{init}', for which PEFT has changed the base")


def test_other_adapters_on_a_changed_base_are_refused():
    model = wrapped(llama(), ["q_proj"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    refused(model, ValueError, "holds the adapter 'second' too, and pissa changes the base")
    refused(model, ValueError, "'second' too, and eva moves ranks", "eva", calibration=[])
    for name in ("default", "second"):
        initialize_peft_model(model, "orthogonal", adapter_name=name)
    assert {layer.rank for layer in by_name(model, "second").values()} == {2}
    restore_peft_model(model, "default")
    assert all(layer.start is not None for layer in by_name(model, "second").values())

    model = wrapped(llama(), ["q_proj"])
    start(model, "pissa")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(ValueError, match="pissa of adapter 'default' has changed"):
        initialize_peft_model(model, "pissa", adapter_name="second")


def test_scaled_and_absent_factors_are_refused():
    model = wrapped(llama(), ["q_proj"])
    layer = next(iter(by_name(model).values()))
    layer.module.scale_layer(2.0)
    refused(model, ValueError, "has the scaling 4, but its alpha 8 and rank 4 give 2")
    config = peft.LoraConfig(target_modules=["q_proj"])
    empty = peft.get_peft_model(llama(), config, low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="its factors are on the meta device"):
        initialize_peft_model(empty, "pissa")


def test_another_models_checkpoint_is_refused(tmp_path):
    base = llama()
    of_language("pissa", base, targets=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    for model, match in (
        (wrapped(base, ["q_proj"]), "adapts 'model.layers.0.self_attn.v_proj'"),
        (wrapped(base, ["q_proj", "v_proj"], use_rslora=True), "use_rslora=False, but this PEFT"),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=match):
            load_peft_checkpoint(model, tmp_path)
        assert_unchanged(model, before)
    with pytest.raises(FileNotFoundError):
        load_peft_checkpoint(wrapped(base, ["q_proj"]), tmp_path / "nowhere")
