"""Every mistake: a message with the setting, the value and the fix, and a model left untouched."""

import accelerate
import pytest
import torch
from measures import assert_unchanged, snapshot
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_init import LoraConfig, LoraModel, get_peft_model

BATCHES = [{"input_ids": torch.arange(20).reshape(2, 10)}]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=30,
        )
    )


@pytest.fixture
def refused(model):
    """Call get_peft_model, expect the error, and find the model as it was."""

    def call(match, error=ValueError, calibration=None, device=None, **settings):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        modules = {name: id(module) for name, module in model.named_modules()}
        flags = [p.requires_grad for p in model.parameters()]
        training = [m.training for m in model.modules()]
        settings = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | settings
        with pytest.raises(error, match=match):
            get_peft_model(model, LoraConfig(**settings), calibration=calibration, device=device)
        assert {name: id(module) for name, module in model.named_modules()} == modules
        assert [p.requires_grad for p in model.parameters()] == flags
        assert [m.training for m in model.modules()] == training
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True)

    return call


def test_a_container_is_no_target(refused):
    refused(
        "'model.layers.0.self_attn' is a LlamaAttention", TypeError, target_modules=["self_attn"]
    )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.inner(x, x, x)


def test_a_projection_that_a_fused_kernel_reads_is_adapted():
    """The kernel is given the effective weight; in eval mode too, where it is fused."""
    base, x = Attention().eval(), torch.randn(3, 8)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["out_proj"]))
    with torch.no_grad():
        before = model(x)[0]
        model.layers["inner.out_proj"].lora_B += 1
        after = model(x)[0]
        assert not torch.allclose(after, before)
        model.train()
        assert torch.allclose(model(x)[0], after, atol=1e-6)


def test_views_of_one_flat_buffer_are_not_tied():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    buffer = torch.randn(32)
    for index, layer in enumerate(model):
        layer.weight = nn.Parameter(buffer[16 * index : 16 * index + 16].view(4, 4))
    second = model[1].weight.clone()
    get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    assert torch.equal(model[1].weight, second)


def test_an_adapter_that_cannot_learn_is_pointed_out():
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    with pytest.warns(UserWarning, match="'0' starts with both factors zero under pissa"):
        get_peft_model(model, config)


@pytest.mark.wrong_types
def test_a_model_that_peft_has_injected(model):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="injected by PEFT; pass the plain base model"):
        get_peft_model(adapted, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"pass a lora_init\.LoraConfig"):
        get_peft_model(adapted.unload(), config)


# -- module types and variants ---------------------------------------------------------------------


def refused_on(base, match, error, **settings):
    before = snapshot(base)
    with pytest.raises(error, match=match):
        get_peft_model(base, LoraConfig(**{"r": 2} | settings))
    assert_unchanged(base, before)


@pytest.mark.parametrize("method", [True, "pissa"])
def test_embeddings_that_rescale_themselves(method):
    base = nn.Sequential(nn.Embedding(10, 8, max_norm=1.0))
    refused_on(
        base,
        "target '0' is an Embedding with max_norm=1.0, which rescales .*exclude_modules",
        TypeError, target_modules=["0"], init_lora_weights=method,
    )  # fmt: skip


class Doubled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


def test_embeddings_with_a_forward_of_their_own():
    base = nn.Sequential(Doubled(10, 8))
    refused_on(base, "target '0' is a Doubled, which", TypeError, target_modules=["0"])


def test_a_bias_in_B_of_an_embedding(model):
    refused_on(
        model,
        "lora_bias=True with the Embedding 'model.embed_tokens'.*exclude_modules.*lora_bias=False",
        ValueError, target_modules=["q_proj", "embed_tokens"], lora_bias=True,
    )  # fmt: skip


# -- weights that are elsewhere --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["loftq", "qpissa"])
def test_replacing_weights_that_accelerate_has_offloaded(model, method):
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=method)
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    message = f"q_proj': its weight is offloaded.*{method} replaces it.*load the model"
    with pytest.raises(ValueError, match=message):
        get_peft_model(offloaded, config)
    assert [m._hf_hook for m in model.modules() if hasattr(m, "_hf_hook")] == hooks
    model(input_ids=BATCHES[0]["input_ids"])


class FlatParameter(nn.Parameter):
    """As FSDP calls its own; one cannot be made outside of it."""


@pytest.mark.parametrize("method", [True, "pissa"])
def test_weights_that_fsdp_has_flattened(model, method):
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight = FlatParameter(attention.q_proj.weight.detach())
    refused_on(
        model,
        "q_proj': its weight is flattened by FSDP; inject the adapter before wrapping",
        ValueError, target_modules=["q_proj"], init_lora_weights=method,
    )  # fmt: skip


# -- the rest --------------------------------------------------------------------------------------


def test_dtypes_and_devices(model, refused):
    with pytest.raises(ValueError, match=r"adapter_dtype=torch.int8 .*one of torch.float16"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), adapter_dtype=torch.int8)
    if not torch.cuda.is_available():
        refused("device='cuda' is not supported: no CUDA device is present", device="cuda")


def test_an_orientation_that_no_target_has_warns(model):
    config = LoraConfig(r=2, target_modules=["q_proj"], fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="fan_in_fan_out=True, but every target is an nn.Linear"):
        get_peft_model(model, config)


def test_dropout_with_a_subtracting_method_warns(model):
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1, init_lora_weights="pissa")
    with pytest.warns(UserWarning, match=r"lora_dropout=0.1 with pissa.*lora_dropout=0.0"):
        get_peft_model(model, config)


def test_nothing_works_after_unload(model, tmp_path):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.unload()
    for call in (
        lambda: adapted.disable_adapter().__enter__(),
        adapted.init_report,
        adapted.merge_adapter,
        adapted.unload,
        adapted.merge_and_unload,
        lambda: adapted.save_pretrained(tmp_path),
    ):
        with pytest.raises(RuntimeError, match="was unloaded. Call get_peft_model again"):
            call()
    with pytest.raises(FileNotFoundError, match="no folder"):
        LoraModel.from_pretrained(model, tmp_path / "nowhere")
