"""Every mistake: a message with the setting, the value and the fix, and a model left untouched."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_init import LoraConfig, LoraModel, get_peft_model
from lora_init.injection import injecting

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


def test_rank_above_the_smaller_side(refused):
    message = r"'model.layers.0.self_attn.v_proj': rank 9 exceeds min\(out, in\) = 8.*lower r"
    refused(message, r=9)
    refused("rank 40 exceeds", rank_pattern={"q_proj": 40})


def test_odd_rank_for_orthogonal(refused):
    refused("orthogonal cannot have rank 3.*r is even", r=3, init_lora_weights="orthogonal")


@pytest.mark.parametrize("method", ["corda", "eva"])
def test_calibration_missing_empty_or_exhausted(refused, method):
    refused(f"'{method}' needs calibration data: pass calibration=", init_lora_weights=method)
    refused("gave no batch", init_lora_weights=method, calibration=[])
    used = iter(BATCHES)
    list(used)
    refused("gave no batch", init_lora_weights=method, calibration=used)


@pytest.mark.parametrize("method", ["corda", "eva"])
def test_a_non_finite_activation(model, refused, method):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    refused(
        r"inputs of 'model\.layers\.1\.self_attn\.(q|v)_proj' are not finite",
        init_lora_weights=method,
        calibration=BATCHES,
    )


@pytest.mark.parametrize("method", [True, "orthogonal", "olora", "pissa", "loftq", "pissa_niter_2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(model, refused, method, value):
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 5] = value
    refused(
        r"'model\.layers\.1\.self_attn\.q_proj': its weight holds NaN or inf",
        init_lora_weights=method,
    )


@pytest.mark.parametrize("method", ["olora", "corda", "eva"])
def test_a_module_type_that_is_not_served(refused, method):
    refused(
        f"target 'model.embed_tokens' is a Embedding, which {method} does not serve; allowed are "
        "Conv1D, Conv2d, Linear, Linear4bit, Linear8bitLt. Leave it out with exclude_modules",
        TypeError,
        target_modules=["q_proj", "embed_tokens"],
        init_lora_weights=method,
        calibration=BATCHES,
    )


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


def test_a_projection_that_a_fused_kernel_reads_is_refused():
    with pytest.raises(TypeError, match="NonDynamicallyQuantizableLinear"):
        get_peft_model(Attention(), LoraConfig(r=2, target_modules=["out_proj"]))


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


def test_one_adapter_a_model(model):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapted = get_peft_model(model, config)
    for second in (adapted, model):
        with pytest.raises(ValueError, match=r"has an adapter already.*unload\(\)"):
            get_peft_model(second, config)
    get_peft_model(adapted.unload(), config)


def test_a_model_that_peft_has_injected(model):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="injected by PEFT; pass the plain base model"):
        get_peft_model(adapted, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"pass a lora_init\.LoraConfig"):
        get_peft_model(adapted.unload(), config)


def test_weights_that_are_not_there(model):
    with torch.device("meta"):
        model.model.layers[0].self_attn.q_proj = nn.Linear(16, 16, bias=False)
    with pytest.raises(ValueError, match="meta device"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


def test_dtypes_and_devices(model, refused):
    with pytest.raises(ValueError, match=r"adapter_dtype=torch.int8; allowed are torch.float16"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), adapter_dtype=torch.int8)
    if not torch.cuda.is_available():
        refused("device='cuda': no CUDA device is present", device="cuda")


def test_an_orientation_that_no_target_has_warns(model):
    config = LoraConfig(r=2, target_modules=["q_proj"], fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="fan_in_fan_out=True, but every target is an nn.Linear"):
        get_peft_model(model, config)


def test_dropout_with_a_subtracting_method_warns(model):
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1, init_lora_weights="pissa")
    with pytest.warns(UserWarning, match=r"lora_dropout=0.1 with pissa.*lora_dropout=0.0"):
        get_peft_model(model, config)


def fail_at(monkeypatch, module, name, call):
    """Let the `call`-th call of `module.name` run out of memory."""
    function, calls = getattr(module, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise MemoryError("no memory left")
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)


def test_a_failure_in_the_middle_of_injection_is_undone(model, monkeypatch):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    fail_at(monkeypatch, injecting, "store_weight", 3)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    with pytest.raises(MemoryError):
        get_peft_model(model, config)
    assert list(model.state_dict()) == list(state)
    for key, value in model.state_dict().items():
        assert (value - state[key]).abs().max() <= 1e-6 * state[key].abs().max()
    assert all(p.requires_grad for p in model.parameters())


def test_nothing_works_after_unload(model, tmp_path):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.unload()
    for call in (
        adapted.unload,
        adapted.merge_and_unload,
        lambda: adapted.save_pretrained(tmp_path),
    ):
        with pytest.raises(RuntimeError, match="was unloaded; call get_peft_model again"):
            call()
    with pytest.raises(FileNotFoundError, match="no folder"):
        LoraModel.from_pretrained(model, tmp_path / "nowhere")
