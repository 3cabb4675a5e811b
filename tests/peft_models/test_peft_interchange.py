"""PEFT loads our adapters, we load PEFT's, and what cannot be right is refused.

Tolerances: logits within 1e-6 relative for kept bases, 1e-5 · max(1, ‖s B0 A0‖/‖W‖) for
subtracted ones.
"""

import copy
import json
import shutil
import warnings

import peft
import pytest
import torch
from measures import assert_gap, assert_unchanged, largest_ratio, logits, snapshot, train
from methods import METHODS, RESTORABLE, SUBTRACTING, behavior, handling, one_of_each
from models import bert, data_of, gpt2, llama, t5, t5_batches, token_batches
from products import thinned
from safetensors.torch import load_file, save_file
from torch import nn

from lora_init import LoraConfig, LoraModel, get_peft_model

pytestmark = pytest.mark.sampled(4)
ARCHITECTURES = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def adapt(base, config, batches=None, **options):
    spec, _ = config.initializer()
    calibration = data_of(spec, batches or token_batches())
    return get_peft_model(base, config, calibration=calibration, **options)


def load_with_peft(base, folder):
    """PEFT's loader; a warning of PEFT, for example of missing keys, is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # PEFT corrects fan_in_fan_out by module type, and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return peft.PeftModel.from_pretrained(base, folder).eval()


def assert_peft_agrees(model, base, folder, batches=None):
    """Save `model`, load it with PEFT onto an untouched base, and compare the logits."""
    batches = batches or token_batches()
    expected = logits(model, batches)
    model.save_pretrained(folder)
    subtracted = model.plan.initializer.base == "subtract"
    tolerance = 1e-5 * largest_ratio(model, base) if subtracted else 1e-6
    original = logits(base, batches)
    loaded = load_with_peft(copy.deepcopy(base), folder)
    assert_gap(logits(loaded, batches), expected, tolerance)
    assert max((a - b).abs().max() for a, b in zip(expected, original, strict=True)) > 1e-3
    return loaded


# -- PEFT loads ours -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "method", "use_rslora"),
    thinned(
        [
            pytest.param(name, method, rslora, id=f"{name}-{method}{'-rslora' * rslora}")
            for name in ARCHITECTURES
            for method in RESTORABLE
            for rslora in (False, True)
        ],
        lambda name, method, rslora: (name, handling(method)),
        lambda name, method, rslora: (rslora, handling(method)),
        lambda name, method, rslora: behavior(method),
    ),
)
def test_peft_loads_ours(architecture, method, use_rslora, tmp_path):
    make, targets = ARCHITECTURES[architecture]
    base = make()
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=use_rslora,
        target_modules=targets,
        init_lora_weights=method,
        task_type="CAUSAL_LM",
    )
    model = train(adapt(copy.deepcopy(base), config))
    loaded = assert_peft_agrees(model, base, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True
    assert loaded.peft_config["default"].r == (8 if method in SUBTRACTING else 4)


@pytest.mark.parametrize("method", ["kaiming", "pissa"])
@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"layers.0.self_attn.q_proj": 6, ".*q_proj": 2}},
        {"alpha_pattern": {"layers.0.self_attn.q_proj": 3, ".*q_proj": 25}},
    ],
    ids=["rank", "alpha"],
)
def test_patterns_keep_their_order(patterns, method, tmp_path):
    """The first matching key decides, and the keys of the file are sorted."""
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=method, **patterns
    )
    base = llama()
    model = train(adapt(copy.deepcopy(base), config))
    figures = {n: (layer.rank, layer.scaling) for n, layer in model.layers.items()}
    assert len(set(figures.values())) == 3
    model.save_pretrained(tmp_path)
    ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert {n: (layer.rank, layer.scaling) for n, layer in ours.layers.items()} == figures
    assert_peft_agrees(model, base, tmp_path)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
@every_architecture
def test_peft_loads_our_redistributed_ranks(architecture, use_rslora, tmp_path):
    make, targets = ARCHITECTURES[architecture]
    base = make()
    config = LoraConfig(
        r=8,
        lora_alpha=6,
        use_rslora=use_rslora,
        target_modules=targets,
        init_lora_weights="eva",
        eva_config={"rho": 2.0},
    )
    model = train(adapt(copy.deepcopy(base), config))
    assert len({layer.rank for layer in model.layers.values()}) > 1
    assert_peft_agrees(model, base, tmp_path)
    again = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert {n: la.rank for n, la in again.layers.items()} == {
        n: la.rank for n, la in model.layers.items()
    }
    assert_gap(logits(again, token_batches()), logits(model, token_batches()), 0.0)


@pytest.mark.parametrize("method", ["kaiming", "pissa"])
def test_peft_loads_ours_on_an_encoder_decoder(method, tmp_path):
    base, batches = t5(), t5_batches()
    config = LoraConfig(
        r=4, target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM", init_lora_weights=method
    )
    model = train(adapt(copy.deepcopy(base), config, batches))
    assert_peft_agrees(model, base, tmp_path, batches)


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": r".*layers\.1\..*\.(q|k)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.o_proj"]},
    ],
    ids=lambda selection: "-".join(selection),
)
@pytest.mark.parametrize("prefixed", [True, False], ids=["model.layers", "layers"])
def test_peft_finds_the_same_layers(selection, prefixed, tmp_path):
    """For every way to name them, also if the layer list is at the root of the model."""
    base = llama() if prefixed else llama().model
    config = LoraConfig(r=4, init_lora_weights="pissa", **selection)
    model = train(adapt(copy.deepcopy(base), config))
    model.save_pretrained(tmp_path)
    loaded = load_with_peft(copy.deepcopy(base), tmp_path)
    names = [
        name.removeprefix("base_model.model.")
        for name, module in loaded.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    ]
    assert names == list(model.layers)
    batch = token_batches(1)[0]
    with torch.no_grad():
        assert_gap(loaded(**batch)[0], model(**batch)[0], 1e-5 * largest_ratio(model, base))


@pytest.mark.parametrize("method", ["kaiming", "pissa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_peft_loads_ours_on_a_16_bit_base(dtype, method, tmp_path):
    base = llama().to(dtype)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=method)
    model = train(adapt(copy.deepcopy(base), config))
    expected = logits(model, token_batches())
    model.save_pretrained(tmp_path)
    loaded = load_with_peft(copy.deepcopy(base), tmp_path)
    # PEFT rounds every intermediate result to 16 bits; ours adds in float32.
    assert_gap(logits(loaded, token_batches()), expected, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("method", one_of_each(METHODS, behavior))
def test_config_has_exactly_the_fields_of_peft(method, tmp_path):
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    model = adapt(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=method))
    model.save_pretrained(tmp_path / "ours")
    actual = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert actual.keys() == expected.keys()
    ours = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"}
    differing = {key for key in expected if actual[key] != expected[key]} - ours
    # auto_mapping names the model's class, for PEFT's AutoPeftModel only.
    assert differing <= {"base_model_name_or_path", "auto_mapping"}
    tensors = load_file(next((tmp_path / "ours").glob("*.safetensors")))
    assert all(key.startswith("base_model.model.model.layers.") for key in tensors)


def test_peft_refuses_our_loftq_folder(tmp_path):
    """On the original base PEFT could only load something else."""
    base = llama()
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="loftq")
    model = train(adapt(copy.deepcopy(base), config))
    expected = logits(model, token_batches())
    # A leftover of an earlier save under PEFT's name would be loaded by it.
    plain = LoraConfig(r=4, target_modules=["q_proj"])
    get_peft_model(copy.deepcopy(base), plain).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError)):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_gap(logits(loaded, token_batches()), expected, 0.0)
    # And the other way round: a kept adapter saved over it is what is loaded.
    kept = train(get_peft_model(copy.deepcopy(base), plain))
    kept.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_gap(logits(loaded, token_batches()), logits(kept, token_batches()), 0.0)


# -- ours loads PEFT's -----------------------------------------------------------------------------


def peft_adapter(base, folder, batches=None, **settings):
    """An adapter that PEFT initialized, trained and saved, and its logits."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    train(model)
    expected = logits(model, batches or token_batches())
    model.save_pretrained(folder)
    return model, expected


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("method", [True, False, "gaussian", "orthogonal"])
@every_architecture
def test_ours_loads_pefts(architecture, method, use_rslora, tmp_path):
    make, targets = ARCHITECTURES[architecture]
    base = make()
    _, expected = peft_adapter(
        base, tmp_path, r=4, lora_alpha=6, use_rslora=use_rslora, target_modules=targets,
        init_lora_weights=method, fan_in_fan_out=architecture == "gpt2", task_type="CAUSAL_LM",
    )  # fmt: skip
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_gap(logits(loaded, token_batches()), expected, 1e-6)
    assert all(layer.base_state == "kept" for layer in loaded.layers.values())
    trainable = [n for n, p in loaded.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(loaded.layers)

    # And back again, through our own writer.
    loaded.save_pretrained(tmp_path / "ours")
    assert_gap(
        logits(load_with_peft(copy.deepcopy(base), tmp_path / "ours"), token_batches()),
        expected,
        1e-6,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_ours_finds_pefts_layers(settings, tmp_path):
    base = llama()
    _, expected = peft_adapter(base, tmp_path, r=4, **settings)
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_gap(logits(loaded, token_batches()), expected, 1e-6)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize(
    ("architecture", "method", "use_dora"),
    [
        ("llama", "pissa", False),
        ("llama", "olora", False),
        ("gpt2", "pissa", False),
        ("llama", "pissa", True),
    ],
)
def test_ours_rebuilds_pefts_unconverted(architecture, method, use_dora, use_rslora, tmp_path):
    make, targets = ARCHITECTURES[architecture]
    base = make()
    _, expected = peft_adapter(
        base, tmp_path, r=4, lora_alpha=6, use_rslora=use_rslora, target_modules=targets,
        init_lora_weights=method, fan_in_fan_out=architecture == "gpt2",
        rank_pattern={r".*\.1\..*": 3}, use_dora=use_dora,
    )  # fmt: skip
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    ratio = largest_ratio(loaded, base)
    assert_gap(logits(loaded, token_batches()), expected, 1e-5 * ratio)
    with loaded.disable_adapter():
        assert_gap(logits(loaded, token_batches()), logits(base, token_batches()), 1e-5 * ratio)
    # Ours converts it: PEFT then loads it as a plain adapter.
    loaded.save_pretrained(tmp_path / "converted")
    converted = load_with_peft(copy.deepcopy(base), tmp_path / "converted")
    assert_gap(logits(converted, token_batches()), expected, 1e-5 * ratio)


def test_ours_rebuilds_pefts_unconverted_embedding_and_head(tmp_path):
    """PEFT starts an embedding as True does; the residual of the head is in its file."""
    base = llama()
    _, expected = peft_adapter(
        base, tmp_path, r=4, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "q_proj"],
        init_lora_weights="pissa",
    )  # fmt: skip
    assert "base_model.model.lm_head.base_layer.weight" in load_file(
        tmp_path / "adapter_model.safetensors"
    )
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_gap(logits(loaded, token_batches()), expected, 1e-5 * largest_ratio(loaded, base))
    with loaded.disable_adapter():
        assert_gap(logits(loaded, token_batches()), logits(base, token_batches()), 1e-5)


@pytest.mark.parametrize(
    ("tied", "settings", "match"),
    [
        # PEFT subtracts from the tied weight itself, so the embedding changes too.
        *(
            (
                True,
                {"target_modules": ["lm_head"], "init_lora_weights": method},
                "'lm_head' .* PEFT also changed in 'model.embed_to",
            )
            for method in ("pissa", "olora")
        ),
        (
            False,
            {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "olora"},
            "unconverted olora adapter of PEFT with an embedding",
        ),
        (
            False,
            {"target_modules": ["q_proj"], "trainable_token_indices": [1]},
            "trainable_token_indices",
        ),
    ],
    ids=["tied pissa", "tied olora", "olora embedding", "token indices"],
)
def test_pefts_adapters_of_another_function_are_refused(tied, settings, match, tmp_path):
    base = llama(tied=tied)
    peft_adapter(base, tmp_path, r=4, **settings)
    before = snapshot(base)
    with pytest.raises(ValueError, match=match):
        LoraModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = gpt2().transformer.h[0].attn.c_proj

    def forward(self, x):
        return self.block(x)


def test_pefts_olora_of_a_square_conv1d_is_not_loaded_wrongly(tmp_path):
    """PEFT decomposes the stored (in, out) weight, but applies the factors to (out, in).

    Its function is W x - s (B0 A0)ᵀ x + s B A x, which no decomposition of W gives.
    """
    base = Square()
    x = torch.randn(5, 48)
    model = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(
            r=4, target_modules=["block"], init_lora_weights="olora", fan_in_fan_out=True
        ),
    )
    train(model)
    expected = model(x)
    model.save_pretrained(tmp_path)
    target = copy.deepcopy(base)
    before = snapshot(target)
    try:
        loaded = LoraModel.from_pretrained(target, tmp_path)
    except ValueError:
        assert_unchanged(target, before)
    else:
        assert_gap(loaded(x), expected, 1e-5)


@pytest.mark.parametrize("method", ["pissa_niter_4", "corda", "lora_ga", "astra"])
def test_pefts_that_cannot_be_rebuilt_are_refused(method, tmp_path):
    base = llama()
    start = "pissa_niter_4" if method == "pissa_niter_4" else True
    peft_adapter(base, tmp_path, r=4, target_modules=["q_proj"], init_lora_weights=start)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    values["init_lora_weights"] = method
    if method == "corda":
        values["corda_config"] = {"corda_method": "kpm", "cache_file": None}
    if method == "lora_ga":
        values["lora_ga_config"] = {"direction": "A2rBr", "scale": "unit", "stable_gamma": 16}
    if method == "astra":
        values["astra_config"] = {"cache_file": None, "verbose": False}
    path.write_text(json.dumps(values))
    before = snapshot(base)
    with pytest.raises(ValueError, match=f"init_lora_weights='{method}'.*path_initial_model"):
        LoraModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


def test_pefts_loftq_is_not_loaded_silently(tmp_path):
    """Its factors belong to a quantized base and are wrong on the original one."""
    base = llama()
    peft_adapter(base, tmp_path, r=4, target_modules=["q_proj"])
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text()) | {
        "init_lora_weights": "loftq",
        "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
    }
    path.write_text(json.dumps(values))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            LoraModel.from_pretrained(base, tmp_path)
            said = " ".join(str(warning.message) for warning in caught)
        except ValueError as error:
            said = str(error)
    assert "loftq" in said


def test_peft_converts_and_ours_loads(tmp_path):
    """PEFT's own conversion gives a plain adapter of rank 2r."""
    base = llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa_niter_4")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa_niter_4"
    train(model)
    expected = logits(model, token_batches())
    model.save_pretrained(
        tmp_path / "converted",
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "converted")
    assert_gap(logits(loaded, token_batches()), expected, 1e-5)


def test_ours_loads_pefts_eva(tmp_path):
    """Its redistributed ranks are in the patterns; layers of rank 0 are not targets."""
    base = llama()
    config = peft.LoraConfig(
        r=6, lora_alpha=6, target_modules="all-linear",
        init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0, tau=0.8),
    )  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(base), config)
    batches = token_batches(8, padded=False)
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    train(model)
    expected = logits(model, batches)
    model.save_pretrained(tmp_path)
    ranks = set(json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"].values())
    assert ranks
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_gap(logits(loaded, batches), expected, 1e-6)
    assert ranks <= {layer.rank for layer in loaded.layers.values()}


def test_ours_loads_any_rank(tmp_path):
    """An initialization needs r <= min(out, in); a trained adapter does not."""
    base = llama()
    _, expected = peft_adapter(base, tmp_path, r=40, lora_alpha=6, target_modules=["k_proj"])
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert {layer.rank for layer in loaded.layers.values()} == {40}
    assert_gap(logits(loaded, token_batches()), expected, 1e-6)
    # Ours of rank 20 is 40 in a file, which PEFT writes again without our header.
    config = LoraConfig(r=20, target_modules=["k_proj"], init_lora_weights="pissa")
    model = train(get_peft_model(copy.deepcopy(base), config))
    model.save_pretrained(tmp_path / "ours")
    load_with_peft(copy.deepcopy(base), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    assert all(layer.base_state == "kept" for layer in again.layers.values())
    gap = 1e-5 * largest_ratio(model, base)
    assert_gap(logits(again, token_batches()), logits(model, token_batches()), gap)


def change_file(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_pefts_copies_of_the_base_must_be_the_bases(tmp_path):
    """A targeted embedding is saved with its weight; another vocabulary is another model."""
    base = llama()
    _, expected = peft_adapter(base, tmp_path, r=4, target_modules=["embed_tokens", "lm_head"])
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_gap(logits(loaded, token_batches()), expected, 1e-6)
    for key in ("model.embed_tokens", "lm_head"):
        key = f"base_model.model.{key}.base_layer.weight"
        folder = tmp_path / "changed"
        shutil.copytree(tmp_path, folder, ignore=lambda *_: {"changed"}, dirs_exist_ok=True)
        change_file(folder, lambda tensors, k=key: tensors.update({k: tensors[k][:-1]}))
        before = snapshot(base)
        with pytest.raises(ValueError, match=f"'{key}' in the adapter file"):
            LoraModel.from_pretrained(base, folder)
        assert_unchanged(base, before)


def test_former_pefts_bias_all_wrote_whatever_is_called_bias(tmp_path):
    """T5's relative_attention_bias is an embedding: untrained, but in old files."""
    base, batches = t5(), t5_batches()
    _, expected = peft_adapter(base, tmp_path, batches, r=4, target_modules=["q"], bias="all")
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    key, value = f"base_model.model.{name}", base.get_parameter(name).detach().clone()
    assert key not in load_file(tmp_path / "adapter_model.safetensors")
    change_file(tmp_path, lambda tensors: tensors.update({key: value}))
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_gap(logits(loaded, batches), expected, 1e-6)
    change_file(tmp_path, lambda tensors: tensors.update({key: value + 1}))
    with pytest.raises(ValueError, match="relative_attention_bias.weight' in the adapter file"):
        LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_parameters_are_counted_as_peft_does(capsys):
    settings = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    theirs = peft.get_peft_model(bert(), peft.LoraConfig(**settings))
    ours = get_peft_model(bert(), LoraConfig(**settings))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    theirs.print_trainable_parameters()
    expected = capsys.readouterr().out
    ours.print_trainable_parameters()
    assert capsys.readouterr().out == expected


@pytest.mark.wrong_types
def test_peft_config_objects_convert():
    """By LoraConfig.from_dict(config.to_dict()), as get_peft_model's message says."""
    theirs = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        task_type=peft.TaskType.CAUSAL_LM,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.5),
    )
    with pytest.raises(TypeError, match=r"peft\..*LoraConfig.*from_dict"):
        get_peft_model(llama(), theirs)
    ours = LoraConfig.from_dict(theirs.to_dict())
    assert ours.task_type == "CAUSAL_LM"
    spec, options = ours.initializer()
    assert (spec.name, options.rho) == ("eva", 1.5)
    ours = LoraConfig(
        init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4, loftq_iter=3)
    )
    assert ours.initializer()[1].loftq_iter == 3


def test_peft_task_types_are_accepted():
    """The enumeration is what PEFT's own examples pass."""
    for task_type in ("SEQ_CLS", "CAUSAL_LM"):
        config = LoraConfig(target_modules=["query"], task_type=peft.TaskType(task_type))
        assert config.to_dict()["task_type"] == task_type
    config = LoraConfig(target_modules=["query"], task_type=peft.TaskType.SEQ_CLS)
    assert get_peft_model(bert(), config, dry_run=True).modules_to_save == ("classifier",)
