"""Interchange with PEFT for every module type and variant: both ways, and key for key.

Tolerances: logits within 1e-6 relative for kept bases, 1e-5 · max(1, ‖s B0 A0‖/‖W‖) for
subtracted ones; 2e-6 for DoRA, where both libraries are 7e-7 from float64.
"""

import functools
import json
import warnings
from dataclasses import dataclass, field
from itertools import product

import peft
import pytest
import torch
from measures import assert_gap, relative_gap, train
from methods import behavior
from models import (
    VOCABULARY,
    ConvBlock,
    ConvTower,
    built_once,
    data_of,
    gpt2,
    image_batches,
    llama,
    spread,
    token_batches,
    tower_batches,
)
from packing import packed
from products import every_value, thinned
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from lora_init import LoraConfig, LoraModel, get_peft_model, list_initializers

pytestmark = [
    pytest.mark.sampled(3),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape"),
]


@built_once
def bert(kind=None):
    """Rows of 64 and 128, so that bitsandbytes' blocks end with them."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64, num_labels=8,
    )  # fmt: skip
    model = spread(BertForSequenceClassification(config)).eval()
    return model if kind is None else packed(model, kind)


@dataclass(frozen=True)
class Case:
    """A model with targets of one module type.

    Attributes:
        make: the base model, equal every time.
        ranks, alphas: patterns for it.
        copies: keys of base weights that PEFT writes too and we do not.
        by_layer: compare the layers' outputs, not the logits: LLM.int8's forward rounds inputs to
            8 bits, so that a difference in the last bit may become one of 1e-2.
    """

    make: object
    batches: object
    targets: list
    ranks: dict
    alphas: dict
    copies: set = field(default_factory=set)
    by_layer: bool = False


EMBEDDING = "base_model.model.model.embed_tokens.base_layer.weight"
HEAD = "base_model.model.lm_head.base_layer.weight"
LINEAR = ["query", "intermediate.dense"]
CASES = {
    "Linear": Case(bert, token_batches, LINEAR, {r"layer\.1\..*query": 6}, {"dense": 3}),
    "Conv1D": Case(
        gpt2, token_batches, ["c_attn", "c_proj"], {r"h\.1\..*c_proj": 6}, {"c_attn": 3}
    ),
    "Embedding": Case(
        llama, token_batches, ["embed_tokens", "v_proj", "lm_head"],
        {"v_proj": 2}, {"embed_tokens": 3}, {EMBEDDING, HEAD},
    ),
    "tied": Case(
        functools.partial(llama, tied=True), token_batches, ["embed_tokens", "v_proj"],
        {"v_proj": 2}, {"embed_tokens": 3}, {EMBEDDING},
    ),
    "Conv2d": Case(
        ConvBlock, image_batches, ["conv1", "conv2", "conv_shortcut", "time_emb_proj"],
        {"conv2": 6}, {"conv1": 3},
    ),
    **{
        f"Conv{dimensions}d": Case(
            functools.partial(ConvTower, dimensions),
            functools.partial(tower_batches, dimensions),
            ["first", "second"], {"second": 6}, {"first": 3},
        )
        for dimensions in (1, 3)
    },
    "Linear4bit": Case(
        functools.partial(bert, "nf4 double"), token_batches, LINEAR,
        {r"layer\.1\..*query": 6}, {"dense": 3},
    ),
    "Linear8bitLt": Case(
        functools.partial(bert, "int8"), token_batches, LINEAR,
        {r"layer\.1\..*query": 6}, {"dense": 3}, by_layer=True,
    ),
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {},  # each case's own
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias-all": {"bias": "all"},
    "bias-lora_only": {"bias": "lora_only"},
}
ABSENT = {
    ("Embedding", "lora_bias"),
    ("tied", "lora_bias"),  # neither library supports it on embeddings
    ("Linear8bitLt", "dora"),  # on a CPU PEFT 0.21.2 loses the codes of a weight that it moves
}
CELLS = [(case, variant) for case in CASES for variant in VARIANTS if (case, variant) not in ABSENT]


def settings_of(case, variant):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": case.targets} | VARIANTS[variant]
    if variant == "patterns":
        settings |= {"rank_pattern": case.ranks, "alpha_pattern": case.alphas}
    return settings


@torch.no_grad()
def outputs(model, case):
    model.eval()
    if not case.by_layer:
        results = [model(**batch) for batch in case.batches()]
        return [r if isinstance(r, torch.Tensor) else r.logits for r in results]
    generator = torch.Generator().manual_seed(0)
    adapted = isinstance(model, LoraModel | peft.PeftModel)
    inner = model.get_base_model() if adapted else model
    layers = [inner.get_submodule(f"bert.encoder.layer.{i}") for i in (0, 1)]
    names = ("attention.self.query", "intermediate.dense")
    return [
        layer.get_submodule(name)(torch.randn(5, 64, generator=generator))
        for layer in layers
        for name in names
    ]


def tolerance(model):
    kept = 2e-6 if model.plan.use_dora else 1e-6
    if model.plan.initializer.base != "subtract":
        return kept
    ratios = (
        float(layer.initial_product().norm() / layer.original_weight().norm())
        for layer in model.layers.values()
    )
    return 1e-5 * max(1.0, *ratios)


def adapted(case, **settings):
    config = LoraConfig(**settings)
    calibration = data_of(config.initializer()[0], case.batches())
    return get_peft_model(case.make(), config, calibration=calibration)


def load_with_peft(base, folder):
    """PEFT's loader; a warning of missing or unexpected keys is a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*(missing|unexpected).*")
        return peft.PeftModel.from_pretrained(base, folder)


def assert_peft_agrees(model, case, folder):
    expected = outputs(model, case)
    model.save_pretrained(folder)
    loaded = load_with_peft(case.make(), folder)
    assert_gap(outputs(loaded, case), expected, tolerance(model))
    assert relative_gap(expected, outputs(case.make(), case)) > 1e-3


# -- PEFT loads ours -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variant", "method"),
    every_value(
        [
            pytest.param(name, variant, method, id=f"{name}-{variant}-{method}")
            for name, variant in CELLS
            for method in ("kaiming", "pissa")
        ],
        3,
    ),
)
def test_peft_loads_ours(name, variant, method, tmp_path):
    case = CASES[name]
    model = train(adapted(case, init_lora_weights=method, **settings_of(case, variant)))
    kinds = {layer.module_type for layer in model.layers.values()}
    assert name in kinds or name == "tied"
    assert_peft_agrees(model, case, tmp_path)


@pytest.mark.parametrize(
    ("name", "method", "use_dora"),
    thinned(
        [
            pytest.param(kind, spec.name, dora, id=f"{kind}-{spec.name}{'-dora' * dora}")
            for kind in ("Embedding", "Conv1d", "Conv2d", "Conv3d", "Linear4bit", "Linear8bitLt")
            for spec in list_initializers()
            for dora in (False, True)
            if kind in spec.module_types
            and spec.base != "replace"
            and spec.name not in ("kaiming", "pissa")
            and not (dora and (kind, "dora") in ABSENT)
        ],
        lambda kind, method, dora: behavior(method),
        lambda kind, method, dora: (kind, dora),
    ),
)
def test_peft_loads_every_method_of_ours(name, method, use_dora, tmp_path):
    case = CASES[name]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": case.targets, "use_dora": use_dora}
    model = train(adapted(case, init_lora_weights=method, **settings))
    assert_peft_agrees(model, case, tmp_path)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("name", ["Linear", "Embedding", "Conv2d", "Conv3d", "Linear4bit"])
def test_a_subtracting_dora_is_written_at_twice_the_rank(name, use_rslora, tmp_path):
    """The magnitude belongs to the whole weight, for every base."""
    case = CASES[name]
    model = train(
        adapted(case, init_lora_weights="pissa", use_dora=True, use_rslora=use_rslora,
                **settings_of(case, "patterns"))
    )  # fmt: skip
    assert_peft_agrees(model, case, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["use_dora"] is True
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for target in model.plan.targets:
        layer, key = model.layers[target.name], f"base_model.model.{target.name}"
        assert torch.equal(
            tensors[f"{key}.lora_magnitude_vector"].flatten(), layer.lora_magnitude_vector
        )
        first = tensors.get(f"{key}.lora_A.weight", tensors.get(f"{key}.lora_embedding_A"))
        assert first.shape[0] == 2 * target.rank


# -- ours loads PEFT's, and both write the same keys -----------------------------------------------


@pytest.mark.parametrize(("name", "variant"), every_value(CELLS, 2))
def test_ours_loads_pefts_and_writes_the_same_keys(name, variant, tmp_path):
    case = CASES[name]
    settings = settings_of(case, variant)
    transposed = {"fan_in_fan_out": True} if name == "Conv1D" else {}
    theirs = train(peft.get_peft_model(case.make(), peft.LoraConfig(**settings, **transposed)))
    expected = outputs(theirs, case)
    theirs.save_pretrained(tmp_path / "theirs")

    loaded = LoraModel.from_pretrained(case.make(), tmp_path / "theirs")
    assert_gap(outputs(loaded, case), expected, tolerance(loaded))
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert loaded.get_nb_trainable_parameters()[0] == count

    # The same configuration, started and saved by us.
    adapted(case, **settings).save_pretrained(tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs", case)
    # And what was loaded, saved again.
    loaded.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "theirs", case)
    again = load_with_peft(case.make(), tmp_path / "again")
    assert_gap(outputs(again, case), expected, tolerance(loaded))


def shapes(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key: tuple(value.shape) for key, value in tensors.items()}


def assert_same_files(ours, theirs, case):
    expected = shapes(theirs)
    assert case.copies <= expected.keys()
    assert shapes(ours) == expected
    mine, other = (json.loads((f / "adapter_config.json").read_text()) for f in (ours, theirs))
    assert mine.keys() == other.keys()
    differing = {key for key in other if mine[key] != other[key]}
    # Patterns, and targets whose last parts say too little, are written by whole names;
    # auto_mapping is for PEFT's AutoPeftModel only.
    assert differing <= {"target_modules", "rank_pattern", "alpha_pattern", "auto_mapping"}


@pytest.mark.parametrize(
    ("method", "variant"), every_value(product(("kaiming", "pissa"), VARIANTS), 2)
)
def test_every_variant_with_a_trained_head(method, variant, tmp_path):
    """bias="all" makes PEFT write the head's bias three times; one of them is the trained one."""
    case = CASES["Linear"]
    settings = settings_of(case, variant) | {"task_type": "SEQ_CLS"}
    model = train(adapted(case, init_lora_weights=method, **settings))
    assert_peft_agrees(model, case, tmp_path / "ours")
    if method == "pissa":
        return
    theirs = train(peft.get_peft_model(case.make(), peft.LoraConfig(**settings)))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = LoraModel.from_pretrained(case.make(), tmp_path / "theirs")
    assert_gap(outputs(loaded, case), outputs(theirs, case), tolerance(loaded))
    head = "base_model.model.classifier"
    third = {f"{head}.modules_to_save.bias", f"{head}.original_module.bias"}
    surplus = shapes(tmp_path / "theirs").keys() - shapes(tmp_path / "ours").keys()
    assert surplus == (third if variant == "bias-all" else set())
