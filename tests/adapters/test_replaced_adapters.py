"""Adapters of replaced bases have a lossless file format, which is refused on another base.

PEFT's format cannot store a base that was quantized again: LoftQ, QPiSSA, a requantized residual,
and a quantized base that was computed from the unquantized checkpoint.
"""

import json

import peft
import pytest
import torch
from measures import assert_unchanged, logits, snapshot, train
from models import VOCABULARY, built_once, spread, token_batches
from packing import packed
from products import every_value
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_init import LoraConfig, LoraModel, get_peft_model

pytestmark = pytest.mark.sampled(4)

OWN, PEFTS = "lora_init_adapter.safetensors", "adapter_model.safetensors"


@built_once
def llama(kind=None, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = spread(LlamaForCausalLM(config)).eval()
    return model if kind is None else packed(model, kind)


# name: (kind of base, method, whether it needs the unquantized checkpoint, further arguments)
CASES = {
    "loftq": (None, "loftq", False, {}),
    "qpissa": (None, "qpissa", False, {}),
    "loftq-nf4": ("nf4", "loftq", True, {}),
    "qpissa-nf4-double": ("nf4 double", "qpissa", True, {}),
    "loftq-int8": ("int8", "loftq", True, {}),
    "requantized-nf4": ("nf4", "pissa", False, {"quantized_base": "requantize"}),
    "requantized-fp4-double": ("fp4 double", "olora", False, {"quantized_base": "requantize"}),
    "requantized-int8": ("int8", "pissa", False, {"quantized_base": "requantize"}),
    "requantized-originals": ("nf4", "pissa", True, {"quantized_base": "requantize"}),
}
every_case = pytest.mark.parametrize("case", CASES)


def originals(seed=0):
    return llama(seed=seed).state_dict()


def adapted(case, **settings):
    kind, method, needs, arguments = CASES[case]
    settings = {"target_modules": ["q_proj", "up_proj"]} | settings
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=method, **settings)
    if needs:
        arguments = arguments | {"original_weights": originals()}
    return train(get_peft_model(llama(kind), config, **arguments))


def loaded(case, folder, **arguments):
    kind, _, needs, _ = CASES[case]
    if needs:
        arguments = {"original_weights": originals()} | arguments
    return LoraModel.from_pretrained(llama(kind), folder, **arguments)


def assert_same_logits(actual, expected):
    """Compare exactly: saving and loading a replaced base rounds nothing."""
    batches = token_batches()
    pairs = zip(logits(actual, batches), logits(expected, batches), strict=True)
    assert all(torch.equal(a, e) for a, e in pairs)


VARIANTS = {
    "plain": {},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "rslora-patterns": {"use_rslora": True, "rank_pattern": {"q.*": 2}},
}


@pytest.mark.parametrize(
    ("case", "variant"),
    every_value(
        [
            pytest.param(case, variant, id=f"{case}-{name}")
            for case in CASES
            for name, variant in VARIANTS.items()
        ],
        2,
    ),
)
def test_it_loads_bit_for_bit(case, variant, tmp_path):
    model = adapted(case, **variant)
    assert {layer.base_state for layer in model.layers.values()} == {"replaced"}
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", OWN]
    again = loaded(case, tmp_path)
    assert_same_logits(again, model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trainable
    again.save_pretrained(tmp_path / "again")
    assert_same_logits(loaded(case, tmp_path / "again"), model)


@every_case
def test_peft_refuses_the_folder(case, tmp_path):
    """On the original base PEFT could only load another model."""
    adapted(case).save_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError)):
        peft.PeftModel.from_pretrained(llama(CASES[case][0]), tmp_path)


def test_a_partly_quantized_model_is_saved_in_one_file(tmp_path):
    """Float layers are edited, quantized layers are replaced, and one file stores both."""
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights="pissa")
    model = train(get_peft_model(llama("nf4"), config, quantized_base="requantize"))
    states = {layer.module_type: layer.base_state for layer in model.layers.values()}
    assert states == {"Linear4bit": "replaced", "Linear": "edited"}
    model.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(llama("nf4"), tmp_path)
    assert_same_logits(again, model)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case[2]])
def test_original_weights_that_were_not_used_are_not_read(case, tmp_path):
    model = adapted(case)
    model.save_pretrained(tmp_path)
    assert_same_logits(loaded(case, tmp_path, original_weights=originals(seed=1)), model)


def test_the_original_weights_are_kept_on_request(tmp_path):
    model = adapted("requantized-nf4")
    model.save_pretrained(tmp_path)
    again = loaded("requantized-nf4", tmp_path, keep_original=True)
    with again.disable_adapter():
        assert_same_logits(again, llama("nf4"))
    assert_same_logits(again.unload(), llama("nf4"))


# -- refusals, with nothing changed ----------------------------------------------------------------


def refused(folder, message, kind, **arguments):
    base = llama(kind)
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        LoraModel.from_pretrained(base, folder, **arguments)
    assert_unchanged(base, before)


def test_an_error_requests_the_unquantized_checkpoint(tmp_path):
    adapted("loftq-nf4").save_pretrained(tmp_path / "adapter")
    message = r"'model.layers.0.self_attn.q_proj' was quantized from.*original_weights=<its folder>"
    refused(tmp_path / "adapter", message, "nf4")
    llama().save_pretrained(tmp_path / "model")
    again = LoraModel.from_pretrained(
        llama("nf4"), tmp_path / "adapter", original_weights=tmp_path / "model"
    )
    assert_same_logits(again, adapted("loftq-nf4"))


def test_another_checkpoint_is_refused(tmp_path):
    adapted("loftq-nf4").save_pretrained(tmp_path)
    foreign, near, fewer = originals(seed=1), originals(), originals()
    refused(tmp_path, r"q_proj' differs from the model's by", "nf4", original_weights=foreign)
    # A checkpoint after more training differs by less than the quantization error.
    name = "model.layers.1.mlp.up_proj.weight"
    near[name] = near[name] + 0.05 * near[name].std() * torch.randn_like(near[name])
    message = r"original_weights: .*layers.1.mlp.up_proj' is not the one"
    refused(tmp_path, message, "nf4", original_weights=near)
    del fewer[name]
    message = r"original_weights: .*no weight for 'model.layers.1.mlp.up_proj'"
    refused(tmp_path, message, "nf4", original_weights=fewer)


@pytest.mark.parametrize(
    ("case", "kind", "expected"),
    [
        ("requantized-nf4", "fp4", "nf4/64"),
        ("requantized-nf4", "nf4 double", "nf4/64"),
        ("requantized-fp4-double", "nf4 double", r"fp4/64\+double"),
        ("requantized-int8", "nf4", "int8"),
        ("loftq-nf4", "fp4", "nf4/64"),
        ("qpissa-nf4-double", "nf4", r"nf4/64\+double"),
    ],
)
def test_a_base_with_another_quantization_is_refused(case, kind, expected, tmp_path):
    adapted(case).save_pretrained(tmp_path)
    arguments = {"original_weights": originals()} if CASES[case][2] else {}
    message = rf"is quantized as .*trained on {expected}. Load the model with the quantization_conf"
    refused(tmp_path, message, kind, **arguments)


@pytest.mark.parametrize("case", ["requantized-nf4", "requantized-int8", "loftq-nf4"])
def test_an_unquantized_base_is_refused(case, tmp_path):
    adapted(case).save_pretrained(tmp_path)
    arguments = {"original_weights": originals()} if CASES[case][2] else {}
    message = "is not the one the adapter was trained on|is given, but no target is quantized"
    refused(tmp_path, message, None, **arguments)


@pytest.mark.parametrize("case", ["loftq", "qpissa"])
def test_a_quantized_base_is_refused_as_original_weights(case, tmp_path):
    """Quantizing a weight twice gives another weight than quantizing it once."""
    adapted(case).save_pretrained(tmp_path)
    refused(tmp_path, "quantized base is computed from these weights", "nf4")


@pytest.mark.parametrize("case", ["loftq", "requantized-nf4"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, k: t.pop(k + "replacement_A"), "lacks '.*q_proj.replacement_A'"),
        (lambda t, k: t.pop(k + "lora_B.weight"), "lacks '.*q_proj.lora_B.weight'"),
        (lambda t, k: t.update({k + "extra": torch.ones(2)}), "contains '.*q_proj.extra'"),
        (
            lambda t, k: t.update({k + "replacement_B": torch.ones(64, 3)}),
            r"'.*q_proj.replacement_B' has shape \(64, 3\): must be \(64, 4\)",
        ),
        (lambda t, k: t[k + "replacement_B"].fill_(float("inf")), "replacement_B' contains NaN or"),
    ],
    ids=["no-replacement", "no-factor", "surplus", "shape", "infinite"],
)
def test_a_damaged_file_is_refused(case, change, message, tmp_path):
    adapted(case).save_pretrained(tmp_path)
    with safe_open(tmp_path / OWN, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(tensors, "base_model.model.model.layers.0.self_attn.q_proj.")
    save_file(tensors, tmp_path / OWN, metadata=metadata)
    refused(tmp_path, message, CASES[case][0])


def test_a_later_format_is_refused(tmp_path):
    adapted("loftq").save_pretrained(tmp_path)
    with safe_open(tmp_path / OWN, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    header = json.loads(metadata["lora_init"]) | {"format_version": 2}
    save_file(tensors, tmp_path / OWN, metadata={"lora_init": json.dumps(header)})
    refused(tmp_path, "format_version=2 .* is not supported: must be 1", None)


def test_a_subtraction_in_the_forward_pass_needs_no_such_file(tmp_path):
    """An unchanged base has PEFT's file format, even if the unquantized weights were read."""
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    model = train(get_peft_model(llama("nf4"), config, original_weights=originals()))
    assert {layer.base_state for layer in model.layers.values()} == {"in_forward"}
    model.save_pretrained(tmp_path)
    assert (tmp_path / PEFTS).exists()
    again = LoraModel.from_pretrained(llama("nf4"), tmp_path)
    assert_same_logits(again, model)
    with pytest.warns(UserWarning, match="is not the one the adapter was trained on"):
        LoraModel.from_pretrained(llama("fp4"), tmp_path)


class Dilated(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(6, 8, 3, padding=2, **options)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("method", ["kaiming", "pissa"])
@pytest.mark.parametrize(
    "options", [{"dilation": 2}, {"padding_mode": "circular"}], ids=["dilation", "padding_mode"]
)
def test_a_convolution_that_peft_computes_differently_needs_our_format(options, method, tmp_path):
    """PEFT's A has only the base's stride and padding, so equal tensors give another function."""
    config = LoraConfig(r=4, target_modules=["conv"], init_lora_weights=method)
    model = train(get_peft_model(Dilated(**options), config))
    model.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / OWN).exists()
    with pytest.raises((ValueError, OSError)):
        peft.PeftModel.from_pretrained(Dilated(**options), tmp_path / "ours")
    x = torch.randn(2, 6, 9, 9)
    again = LoraModel.from_pretrained(Dilated(**options), tmp_path / "ours")
    torch.testing.assert_close(again(x), model(x))
    # PEFT's adapter of such a convolution is refused too.
    theirs = peft.get_peft_model(Dilated(**options), peft.LoraConfig(r=4, target_modules=["conv"]))
    theirs.save_pretrained(tmp_path / "theirs")
    message = r"dilation=.*padding_mode=.*Conv2d 'conv'.*PEFT's lora_A ignores both"
    with pytest.raises(ValueError, match=message):
        LoraModel.from_pretrained(Dilated(**options), tmp_path / "theirs")
