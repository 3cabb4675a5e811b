"""Models that read `layer.weight` instead of calling the layer."""

import copy
import warnings
from itertools import product

import pytest
import torch
import transformers
from models import llama, spread, t5, token_batches
from networks import Case
from products import every_pair, thinned
from torch import nn
from torch.nn import functional

from lora_init import LoraConfig, get_peft_model
from lora_init.weights.kinds import FORMATS

KINDS = ("Linear", "Conv1D", "Conv2d", "Embedding", "Linear4bit", "Linear8bitLt")
STARTS = {"pissa": {}, "olora": {}, "kaiming": {}, "pissa-dora": {"use_dora": True}}


def adapt(model, targets, start="pissa", **settings):
    method, _, _ = start.partition("-")
    config = LoraConfig(
        r=4, target_modules=targets, init_lora_weights=method, **STARTS.get(start, {}), **settings
    )
    return get_peft_model(model, config, cache=False)


def shaken(model, size=0.05):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def gap(found, wanted):
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize(
    ("kind", "dtype", "start"),
    every_pair(
        [
            (kind, dtype, start)
            for kind, dtype, start in product(KINDS, [torch.float32, torch.bfloat16], STARTS)
            if (kind, start) != ("Embedding", "olora")
        ],
        3,
    ),
    ids=str,
)
def test_the_weight_is_the_one_that_the_layer_multiplies_by(kind, dtype, start):
    case = Case(kind, torch.float32 if kind in KINDS[4:] else dtype)
    base = case.build()
    originals = {name: module for name, module in copy.deepcopy(base).named_modules()}
    model = shaken(adapt(base, list(case.shapes), start))
    bound = 1e-6 if case.dtype == torch.float32 else 2**-8
    for name, layer in model.layers.items():
        stored = layer.base_layer.weight
        if not case.packed:
            assert layer.weight.shape == stored.shape
            assert layer.weight.dtype == stored.dtype
        orient = FORMATS[layer.module_type].orient
        assert gap(orient(layer.weight).float(), layer.merged_weight()) < bound
        with model.disable_adapter():
            wanted = layer._oriented_weight if case.packed else None
            wanted = wanted() if wanted else orient(originals[name].weight)
            assert gap(FORMATS[layer.module_type].orient(layer.weight), wanted) < bound
    merged = {name: layer.weight.detach() for name, layer in model.layers.items()}
    if not case.packed:  # merging rounds to codes
        model.merge_adapter()
        for name, layer in model.layers.items():
            assert gap(layer.weight, merged[name]) < bound


@pytest.mark.parametrize("start", STARTS)
def test_gradients_through_the_weight_are_those_of_a_call(start):
    case = Case()
    model = shaken(adapt(case.build(), list(case.shapes), start)).double()
    x = case.inputs().double()
    layer = model.layers["square"]

    def gradients(output):
        named = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(output.sin().sum(), named.values())
        return dict(zip(named, found, strict=True))

    called = gradients(layer(x))
    read = gradients(functional.linear(x, layer.weight, layer.bias))
    for name in called:
        assert gap(read[name], called[name]) < 1e-9, name


def test_the_bias_holds_the_adapters_bias():
    model = shaken(adapt(Case().build(), ["square"], "kaiming", lora_bias=True))
    layer = model.layers["square"]
    x = Case().inputs()
    assert gap(functional.linear(x, layer.weight, layer.bias), layer(x)) < 1e-6
    with model.disable_adapter():
        assert layer.bias is layer.base_layer.bias
    model.merge_adapter()
    assert layer.bias is layer.base_layer.bias


def test_reading_changes_nothing():
    model = adapt(Case().build(), ["square"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    draws = torch.get_rng_state()
    _ = model.layers["square"].weight, model.layers["square"].bias
    assert torch.equal(draws, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_setting_the_weight_is_refused_and_tying_again_is_not():
    model = adapt(llama(tied=True), ["lm_head", "q_proj"])
    layer = model.layers["lm_head"]
    layer.weight = layer.base_layer.weight
    model.tie_weights()
    assert layer.base_layer.weight is model.model.embed_tokens.weight
    with pytest.raises(RuntimeError, match="base_layer.weight"):
        layer.weight = nn.Parameter(torch.zeros_like(layer.base_layer.weight))
    with pytest.raises(RuntimeError, match="base_layer.bias"):
        layer.bias = nn.Parameter(torch.zeros(3))


def test_a_failure_while_reading_names_its_cause():
    layer = adapt(Case().build(), ["square"]).layers["square"]
    del layer.scaling
    with pytest.raises(RuntimeError, match="scaling"):
        _ = layer.weight


# -- models that read weights ----------------------------------------------------------------------


class FusedHead(torch.autograd.Function):
    """As a fused loss: it gets the hidden states and the head's weight."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return hidden @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).T @ hidden.flatten(0, -2)


class Reader(nn.Module):
    """Reads weights in one of the ways that models do."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.before = nn.Linear(16, 32)
        self.target = nn.Linear(32, 40)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x):
        x = torch.tanh(self.before(x))
        if self.how == "product":
            return x @ self.target.weight.T
        if self.how == "convolution":
            kernel = self.target.weight[:, :, None, None]
            return functional.conv2d(x.mT[..., None], kernel, self.target.bias)
        if self.how == "fused":
            return FusedHead.apply(x, self.target.weight)
        if self.how == "attention":
            return self.attention(x, x, x, need_weights=False)[0]
        return self.encoder(x)


READERS = {
    "product": ["target"],
    "convolution": ["target"],
    "fused": ["target"],
    "attention": ["out_proj"],
    "encoder": ["out_proj", "linear1", "linear2"],
}


def reader(how):
    torch.manual_seed(0)
    return spread(Reader(how)).eval(), {"x": torch.randn(2, 7, 16)}, READERS[how]


def wavlm():
    torch.manual_seed(0)
    config = transformers.WavLMConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        conv_dim=(16, 16), conv_kernel=(4, 3), conv_stride=(2, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
        num_buckets=16, max_bucket_distance=20,
    )  # fmt: skip
    model = spread(transformers.WavLMModel(config)).eval()
    return model, {"input_values": torch.randn(2, 200)}, ["q_proj", "v_proj", "out_proj"]


def jamba():
    torch.manual_seed(0)
    config = transformers.JambaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=2, num_experts_per_tok=1,
        mamba_d_state=8, mamba_dt_rank=6, pad_token_id=0,
    )  # fmt: skip
    model = spread(transformers.JambaForCausalLM(config)).eval()
    return model, {"input_ids": torch.randint(1, 64, (2, 10))}, ["dt_proj", "x_proj"]


def mamba():
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=1, time_step_rank=6
    )
    model = spread(transformers.MambaForCausalLM(config)).eval()
    return model, {"input_ids": torch.randint(1, 64, (2, 10))}, ["dt_proj", "x_proj"]


MODELS = {"wavlm": wavlm, "jamba": jamba, "mamba": mamba}


def run(model, batch):
    output = model(**batch)
    return getattr(output, "logits", getattr(output, "last_hidden_state", output))


@pytest.mark.parametrize(
    ("name", "start"),
    thinned(
        list(product([*READERS, *MODELS], STARTS)),
        lambda name, start: (name, start == "kaiming"),
        lambda name, start: start,
    ),
)
def test_a_model_that_reads_weights_starts_trains_disables_and_merges(name, start):
    base, batch, targets = MODELS[name]() if name in MODELS else reader(name)
    with torch.no_grad():
        wanted = run(base, batch)
    model = adapt(base, targets, start)
    with torch.no_grad():
        assert gap(run(model, batch), wanted) < 3e-6
    trained = [p for p in model.parameters() if p.requires_grad]
    # B = 0 gets small gradients: smaller steps round to nothing.
    optimizer = torch.optim.SGD(trained, 1e-2 if start == "kaiming" else 1e-3)
    goal = wanted + 0.3 * torch.randn(wanted.shape)
    losses = []
    for _ in range(3):
        loss = (run(model, batch) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        after = run(shaken(model, 0.02), batch)
        assert gap(after, wanted) > 1e-3
        with model.disable_adapter():
            assert gap(run(model, batch), wanted) < 3e-6
        model.merge_adapter()
        assert gap(run(model, batch), after) < 3e-6
        model.unmerge_adapter()
    model.train()
    if name in READERS:
        assert gap(run(model, batch), after) < 3e-6


@pytest.mark.parametrize("start", STARTS)
def test_reading_the_dtype_costs_no_precision(start):
    """T5 reads `wo.weight.dtype` before each call of wo."""
    base = t5()
    batch = token_batches(1)[0] | {"decoder_input_ids": token_batches(1)[0]["input_ids"]}
    with torch.no_grad():
        wanted = run(base, batch)
        assert gap(run(adapt(base, ["wo"], start), batch), wanted) < 3e-6


@pytest.mark.parametrize("how", ["product", "attention"])
def test_compiled_without_a_graph_break(how):
    base, batch, targets = reader(how)
    model = shaken(adapt(base, targets)).train()
    wanted = run(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = run(compiled, batch)
    assert gap(found, wanted) < 1e-6
    found.square().sum().backward()
    assert model.layers[next(iter(model.layers))].lora_A.grad.any()


def test_functional_transforms_see_through_the_weight():
    base, batch, targets = reader("product")
    model = shaken(adapt(base, targets))
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values):
        return torch.func.functional_call(model, values, (batch["x"],)).square().sum()

    found = torch.func.grad(loss)(values)
    run(model, batch).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert gap(found[name], parameter.grad) < 1e-5


@pytest.mark.parametrize("check", ["first pass", "verify"])
def test_saving_says_where_peft_would_ignore_the_adapter(check, tmp_path):
    base, batch, targets = wavlm()
    settings = {"verify": batch} if check == "verify" else {}
    config = LoraConfig(r=2, target_modules=targets)
    model = get_peft_model(base, config, **settings)
    if check == "first pass":
        run(model, batch)
    with pytest.warns(UserWarning, match=r"reads the weight of .*q_proj.* PEFT and other loaders"):
        model.save_pretrained(tmp_path)


def test_saving_says_nothing_where_every_layer_is_called(tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=2))
    run(model, {"input_ids": torch.arange(3, 9)[None]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
