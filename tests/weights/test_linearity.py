"""Subclasses and forwards that were set on an instance: a probe decides what they compute."""

import copy
import types
from itertools import product

import peft
import pytest
import torch
from models import llama, token_batches
from products import every_pair
from torch import nn
from torch.nn import functional
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from lora_init import LoraConfig, get_peft_model, initialize_peft_model
from lora_init.weights.kinds import class_format, module_type


class Transposed(nn.Linear):
    def forward(self, hidden_states):
        product = hidden_states @ self.weight.T
        return product if self.bias is None else product + self.bias


class Wide(nn.Linear):
    """As some heads: float32 inside, the input's dtype outside."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(x.float(), self.weight.float(), bias).to(x.dtype)


class Counting(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.seen.append(x.shape)
        return super().forward(x)


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-100, 100))


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x + 0.01 * torch.randn_like(x) if self.training else x)


class WithLora(nn.Linear):
    """Its factors add nothing yet."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.A = nn.Parameter(torch.randn(2, self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.A.T @ self.B.T


class Gated(nn.Linear):
    def forward(self, x):
        return super().forward(x) * torch.sigmoid(x.mean(-1, keepdim=True))


class Quantizing(nn.Linear):
    def forward(self, x):
        step = x.abs().amax(-1, keepdim=True) / 127
        return super().forward((x / step).round() * step)


class Normed(nn.Linear):
    def forward(self, x):
        return functional.linear(x, functional.normalize(self.weight, dim=1), self.bias)


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x), self.bias


class Clipping(nn.Linear):
    """Changes its own weight."""

    def forward(self, x):
        self.weight.data.clamp_(-0.01, 0.01)
        return super().forward(x)


class Convolution(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight, self.bias)


class Padding(nn.Conv2d):
    def forward(self, x):
        return super().forward(functional.pad(x, (0, 1, 0, 1)))


class Lookup(nn.Embedding):
    def forward(self, ids):
        return self.weight[ids]


class OwnConv1D(Conv1D):
    def forward(self, x):
        return x @ self.weight + self.bias


LINEAR = {
    Transposed: "Linear", Wide: "Linear", Counting: "Linear",
    Convolution: "Conv2d", Lookup: "Embedding", OwnConv1D: "Conv1D",
}  # fmt: skip
OTHERS = (
    Clamped, Noisy, WithLora, Gated, Quantizing, Normed, Router, Clipping, Padding,
    OPTLearnedPositionalEmbedding,
)  # fmt: skip


def refusal(module):
    return class_format(module).refusal(module)


def made(cls, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = (12, 16, 3) if issubclass(cls, nn.Conv2d) else (40, 24)
    return cls(*sizes).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", LINEAR, ids=lambda cls: cls.__name__)
def test_a_subclass_with_a_linear_forward_is_supported(cls, dtype):
    module = made(cls, dtype)
    assert refusal(module) is None
    assert module_type(module) == LINEAR[cls]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", OTHERS, ids=lambda cls: cls.__name__)
def test_another_subclass_is_refused_by_name(cls, dtype):
    model = nn.Sequential(made(cls, dtype), nn.Linear(4, 4))
    with pytest.raises(TypeError, match=f"'0' is a {cls.__name__}.*own forward"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    plan = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"), dry_run=True)
    assert [target.name for target in plan.targets] == ["1"]


@pytest.mark.parametrize("cls", [Counting, Noisy, Clipping, WithLora], ids=lambda c: c.__name__)
def test_the_probe_changes_nothing(cls):
    module = made(cls)
    module.register_forward_hook(lambda *_: pytest.fail("the probe ran a hook"))
    before, draws = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    module_type(module)
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert module.training
    assert getattr(module, "seen", []) == []


def test_a_module_is_probed_once(monkeypatch):
    calls = []

    def forward(self, x):
        calls.append(x.shape)
        return x @ self.weight.T + self.bias

    monkeypatch.setattr(Transposed, "forward", forward)
    module = made(Transposed)
    module_type(module)
    count = len(calls)
    for _ in range(3):
        module_type(module)
    assert len(calls) == count > 0


def test_a_subclass_on_the_meta_device_is_refused_unless_its_class_is_known():
    class Fresh(Transposed):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    with torch.device("meta"):
        unloaded = Fresh(8, 8)
    assert "meta device" in refusal(unloaded)
    assert refusal(Fresh(8, 8)) is None
    assert refusal(unloaded) is None


@pytest.mark.parametrize("start", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("method", ["pissa", "olora", "kaiming"])
def test_falcon_is_adapted_with_its_default_targets(method, start):
    torch.manual_seed(0)
    settings = {"num_hidden_layers": 1, "num_attention_heads": 4, "bias": True}
    base = FalconForCausalLM(FalconConfig(vocab_size=96, hidden_size=32, **settings)).eval()
    batch = token_batches(1)[0]
    wanted = base(**batch).logits
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=method, **start), verify=batch)
    assert list(model.layers) == ["transformer.h.0.self_attention.query_key_value"]
    found = model(**batch).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-6
    names = get_peft_model(
        model.unload(), LoraConfig(r=2, target_modules="all-linear"), dry_run=True
    ).candidates
    assert "transformer.h.0.mlp.dense_h_to_4h" in names


# -- a forward on the instance ---------------------------------------------------------------------


def rounding(self, x):
    step = x.abs().amax(-1, keepdim=True) / 127
    return functional.linear((x / step).round() * step, self.weight, self.bias)


def coarse(self, x):
    step = self.weight.abs().amax() / 15
    return functional.linear(x, (self.weight / step).round() * step, self.bias)


def plain(self, x):
    return functional.linear(x, self.weight, self.bias)


def gated(self, x):
    return functional.linear(x, self.weight, self.bias) * torch.sigmoid(x.mean(-1, keepdim=True))


def doubled(self, x):
    return 2 * functional.linear(x, self.weight, self.bias)


def network(forward, how="method"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 24))
    for layer in (model[0], model[2]):
        if how == "method":
            layer.forward = types.MethodType(forward, layer)
        else:
            layer.forward = lambda x, layer=layer: forward(layer, x)
    return model


@pytest.mark.parametrize(
    ("forward", "method", "start", "how"),
    every_pair(
        list(
            product(
                [rounding, coarse, plain],
                ["pissa", "olora", "kaiming"],
                [{}, {"use_dora": True}],
                ["method", "closure"],
            )
        ),
        4,
    ),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_forward_on_an_instance_is_what_runs(forward, method, start, how):
    base = network(forward, how)
    x = torch.randn(6, 16)
    wanted = base(x)
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=method, **start)
    )
    assert float((model(x) - wanted).abs().max() / wanted.abs().max()) < 2e-6
    with model.disable_adapter():
        assert float((model(x) - wanted).abs().max() / wanted.abs().max()) < 2e-6
    if method != "kaiming":
        state = "edited" if forward is plain else "in_forward"
        assert {layer.base_state for layer in model.layers.values()} == {state}
    assert torch.allclose(model.unload()(x), wanted, atol=1e-6)


@pytest.mark.parametrize("method", ["pissa", "kaiming"])
@pytest.mark.parametrize("forward", [gated, doubled], ids=lambda f: f.__name__)
def test_a_forward_that_computes_something_else_is_refused(forward, method):
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=method)
    with pytest.raises(TypeError, match="'0': a forward was set on this Linear"):
        get_peft_model(network(forward), config)


def test_merging_into_a_rounding_forward_warns():
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa")
    model = get_peft_model(network(rounding), config)
    with pytest.warns(UserWarning, match="'0'"):
        model.merge_adapter()


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8"])
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_compressed_tensors(method, scheme, compress):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    base = llama()
    config = quantization.QuantizationConfig(
        config_groups={"all": quantization.preset_name_to_scheme(scheme, ["Linear"])},
        ignore=["lm_head"],
    )
    quantization.apply_quantization_config(base, config)
    largest = 448 if "FP8" in scheme else 127
    for module in base.modules():
        if hasattr(module, "weight_scale"):
            scale = module.weight.data.abs().amax(1, keepdim=True) / largest
            module.weight_scale.data = scale.to(module.weight_scale.dtype)
    if compress:
        compressors.ModelCompressor(config).compress_model(base)
    batch = token_batches(1)[0]
    with torch.no_grad():
        wanted = base(**batch).logits  # decompresses
        start = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=method)
        model = get_peft_model(base, start)
        assert torch.equal(model(**batch).logits, wanted)
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, wanted)


HOOKS = {
    "a pre-hook": lambda module: module.register_forward_pre_hook(lambda _, given: (3 * given[0],)),
    "a hook": lambda module: module.register_forward_hook(lambda *given: 3 * given[2]),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_hooks_of_a_target_change_the_base_alone(hook, method, tmp_path):
    """The adapter's input and output do not pass through them, as in PEFT."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))
    hook(base[2])
    x = torch.randn(5, 12)
    wanted = base(x)
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=3, target_modules=["2"], init_lora_weights=method)
    )
    torch.testing.assert_close(model(x), wanted)
    with torch.no_grad():
        model.layers["2"].lora_B += 0.3
    trained = model(x)
    assert (trained - wanted).abs().max() > 0.01
    with model.disable_adapter():
        torch.testing.assert_close(model(x), wanted)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(x), trained)
    with pytest.warns(UserWarning, match="module has forward hooks, the first is '2'"):
        model.merge_adapter()

    config = peft.LoraConfig(r=3, target_modules=["2"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    initialize_peft_model(theirs, method)
    torch.testing.assert_close(theirs(x), wanted)


@pytest.mark.parametrize("method", ["kaiming", "orthogonal", "pissa"])
@pytest.mark.parametrize("shape", [(0, 6), (6, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_empty_weight_is_refused_or_left_out_by_name(shape, method):
    rows, columns = shape
    model = nn.Sequential(nn.Linear(columns, rows), nn.Linear(6, 6))
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=method)
    with pytest.raises(ValueError, match=f"'0'.*its weight is empty \\({rows}×{columns}\\)"):
        get_peft_model(model, config)
    config.target_modules = "all-linear"
    with pytest.warns(UserWarning, match="- 0: its weight is empty"):
        adapted = get_peft_model(model, config)
    assert list(adapted.layers) == ["1"]


def test_a_lazy_module_is_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 6), nn.LazyLinear(3))
    with pytest.raises(ValueError, match="'1.weight' of the model has no shape yet"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
