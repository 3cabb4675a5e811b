"""Adapters on nn.MultiheadAttention, against a plain one with the merged weights in float64."""

import copy
from itertools import product

import peft
import pytest
import torch
from measures import EPSILON, assert_gap, assert_unchanged, snapshot, train
from products import every_pair
from safetensors.torch import load_file
from torch import nn

from lora_init import LoraConfig, LoraModel, WithLoss, calibrate, get_peft_model, reinitialize

EXACT = EPSILON[torch.float32]


class Attention(nn.Module):
    """Self-attention and cross-attention, with a mask of padding."""

    def __init__(self, batch_first=True, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.own = nn.MultiheadAttention(16, 4, batch_first=batch_first, **settings)
        self.cross = nn.MultiheadAttention(16, 2, batch_first=batch_first, **settings)
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter, std=0.3)
        self.eval()

    def forward(self, x, memory, need_weights=False):
        mask = torch.zeros(3, 5, dtype=torch.bool)
        mask[1, 3:] = True
        hidden, weights = self.own(x, x, x, key_padding_mask=mask, need_weights=need_weights)
        mixed, _ = self.cross(hidden, memory, memory, need_weights=False)
        return mixed if weights is None else (mixed, weights)


def inputs(base, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x, memory = (torch.randn(3, size, 16, generator=generator).to(dtype) for size in (5, 7))
    return (x, memory) if base.own.batch_first else (x.transpose(0, 1), memory.transpose(0, 1))


def adapt(base, calibration=None, **settings):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["own", "cross"]} | settings
    return get_peft_model(copy.deepcopy(base), LoraConfig(**settings), calibration=calibration)


def dense(base, model):
    """The plain modules in float64 with the weights W + s (B A - B0 A0)."""
    plain = copy.deepcopy(base).double()
    for name in ("own", "cross"):
        attention = plain.get_submodule(name)
        for part, weight in (("in_proj", attention.in_proj_weight),
                             ("out_proj", attention.out_proj.weight)):  # fmt: skip
            layer = model.layers[f"{name}.{part}"]
            with torch.no_grad():
                weight += layer.delta_weight().double()
    return plain


SETTINGS = {
    "bias": {},
    "no bias": {"bias": False},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize(
    ("settings", "batch_first", "method", "use_dora"),
    every_pair(list(product(SETTINGS, (True, False), (True, "pissa"), (False, True))), 4),
)
def test_output_is_that_of_the_merged_weights(settings, batch_first, method, use_dora):
    base = Attention(batch_first, **SETTINGS[settings])
    x = inputs(base)
    model = adapt(base, init_lora_weights=method, use_dora=use_dora)
    assert sorted(model.layers) == [
        "cross.in_proj",
        "cross.out_proj",
        "own.in_proj",
        "own.out_proj",
    ]
    assert_gap(model(*x), base(*x), EXACT)
    train(model, size=0.2)
    merged = copy.deepcopy(model).merge_and_unload()
    expected = merged(*x) if use_dora else dense(base, model)(*(part.double() for part in x))
    with torch.no_grad():
        assert_gap(model(*x), expected, 2 * EXACT)  # torch's fused kernel
    assert_gap(model.train()(*x), expected, 2 * EXACT)
    model.eval()
    for found, wanted in zip(model(*x, need_weights=True), merged(*x, need_weights=True),
                             strict=True):  # fmt: skip
        assert_gap(found, wanted, 2 * EXACT)
    assert_gap(model.own(x[0][0], x[0][0], x[0][0])[0],
               merged.own(x[0][0], x[0][0], x[0][0])[0], 2 * EXACT)  # fmt: skip
    model(*x).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert_gap(model(*x), base(*x), EXACT)
    model.merge_adapter()
    assert_gap(model(*x), expected, 2 * EXACT)
    model.unmerge_adapter()
    assert_gap(merged(*x), expected, 2 * EXACT)


def test_the_original_modules_come_back():
    base = Attention()
    before, x = snapshot(base), inputs(base)
    expected, attention = base(*x), base.own
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["own", "cross"]))
    assert isinstance(base.own, nn.MultiheadAttention)
    assert base.own is not attention
    model = reinitialize(train(model), LoraConfig(r=2, target_modules=["own"]))
    assert sorted(model.layers) == ["own.in_proj", "own.out_proj"]
    assert torch.equal(model.unload()(*x), expected)
    assert base.own is attention
    assert_unchanged(base, before)
    plan = get_peft_model(base, LoraConfig(r=4, target_modules=["own"]), dry_run=True)
    assert [target.shape for target in plan.targets] == [(48, 16), (16, 16)]
    assert_unchanged(base, before)
    assert base.own is attention


def test_a_detached_adapter_can_be_attached_again():
    base = Attention()
    x = inputs(base)
    model = train(adapt(base, init_lora_weights="pissa"))
    expected = model(*x)
    detached = model.detach_adapter()
    assert type(model.base_model.own) is nn.MultiheadAttention
    assert_gap(model.base_model(*x), base(*x), EXACT)
    model.attach_adapter(detached)
    assert_gap(model(*x), expected, EXACT)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_of_torch_uses_the_adapter_in_its_fused_kernel(padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).eval()
    names = ["self_attn"] if padded else ["self_attn", "linear1"]
    config = LoraConfig(r=4, target_modules=names, init_lora_weights="pissa")
    model = get_peft_model(copy.deepcopy(base), config)
    x, padding = torch.randn(3, 6, 16), None
    if padded:
        padding = torch.arange(6).expand(3, 6) >= torch.tensor([[6], [4], [5]])
    with torch.no_grad():
        start = base(x, src_key_padding_mask=padding)
        assert_gap(model(x, src_key_padding_mask=padding), start, 2 * EXACT)
        train(model, size=0.2)
        fused = model(x, src_key_padding_mask=padding)
        merged = copy.deepcopy(model).merge_and_unload()
        assert_gap(fused, merged(x, src_key_padding_mask=padding), 2 * EXACT)
        assert (fused - start).norm() > 0.01 * start.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_preserve_the_output(dtype):
    base = Attention().to(dtype)
    x = inputs(base, dtype)
    model = adapt(base, init_lora_weights="pissa")
    assert_gap(model(*x), base(*x), 2 * EPSILON[dtype] if dtype.itemsize == 2 else 1e-6)


def test_dropout_applies_in_training_only():
    base = Attention()
    x = inputs(base)
    model = train(adapt(base, lora_dropout=0.5), size=0.2)
    expected = copy.deepcopy(model).merge_and_unload()(*x)
    assert_gap(model.eval()(*x), expected, 2 * EXACT)
    first, second = (model.train()(*x) for _ in range(2))
    assert (first - second).norm() > 1e-3 * expected.norm()


# -- calibration -----------------------------------------------------------------------------------


def test_inputs_are_the_rows_of_query_key_and_value():
    base = Attention()
    batches = [dict(zip(("x", "memory"), inputs(base, seed=seed), strict=True)) for seed in (1, 2)]
    config = LoraConfig(r=4, target_modules=["own", "cross"], init_lora_weights="eva")
    before = snapshot(base)
    found = calibrate(base, config, batches).layers
    assert_unchanged(base, before)
    own = torch.cat([batch["x"].flatten(0, 1) for batch in batches])
    hidden = [base.own(b["x"], b["x"], b["x"], key_padding_mask=padding())[0] for b in batches]
    pairs = zip(hidden, batches, strict=True)
    crossed = [torch.cat([queries, b["memory"]], 1).flatten(0, 1) for queries, b in pairs]
    for name, rows in (("own.in_proj", own), ("cross.in_proj", torch.cat(crossed))):
        statistics = found[name].inputs
        assert statistics.tokens == len(rows)
        rows = rows.double()
        assert_gap(statistics.second_moment, rows.T @ rows / len(rows), 1e-5)


def padding():
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    return mask


def test_gradients_are_those_of_both_projections():
    base = Attention()

    def loss(model, batch):
        return model(*batch).sin().sum()

    batches = WithLoss([inputs(base, seed=seed) for seed in (1, 2)], loss)
    config = LoraConfig(r=2, target_modules=["own", "cross"], init_lora_weights="lora_one")
    found = calibrate(base, config, batches).layers
    for batch in batches.batches:
        (loss(base, batch) / 2).backward()
    for name in ("own", "cross"):
        attention = base.get_submodule(name)
        assert_gap(found[f"{name}.in_proj"].gradient, attention.in_proj_weight.grad, 1e-5)
        assert_gap(found[f"{name}.out_proj"].gradient, attention.out_proj.weight.grad, 1e-5)


@pytest.mark.parametrize("method", ["corda", {"name": "eva", "rho": 1.0}], ids=["corda", "eva"])
def test_methods_on_inputs_preserve_the_output(method):
    base = Attention()
    x = inputs(base)
    batches = [{"x": x[0], "memory": x[1]}]
    assert_gap(adapt(base, batches, init_lora_weights=method)(*x), base(*x), 1e-5)


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"rank_pattern": {"own": 2}}])
@pytest.mark.parametrize("method", [True, "pissa"])
def test_peft_and_ours_load_the_file(method, variant, tmp_path, recwarn):
    base = Attention()
    x = inputs(base)
    model = train(adapt(base, init_lora_weights=method, **variant), size=0.2)
    expected = model(*x)
    recwarn.clear()
    model.save_pretrained(tmp_path)
    assert not [w for w in recwarn if "PEFT" in str(w.message)]
    again = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(*x), expected) or method == "pissa"
    assert_gap(again(*x), expected, 2 * EXACT)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_gap(theirs(*x), expected, 1e-5)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_ours_loads_pefts_and_writes_the_same_keys(bias, tmp_path):
    base = Attention()
    x = inputs(base)
    config = peft.LoraConfig(r=4, target_modules=["own"], bias=bias)
    theirs = train(peft.get_peft_model(copy.deepcopy(base), config), size=0.2)
    expected = theirs(*x)
    theirs.save_pretrained(tmp_path / "theirs")
    model = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    assert_gap(model(*x), expected, 1e-6)
    model.save_pretrained(tmp_path / "ours")
    name = "adapter_model.safetensors"
    ours, wanted = load_file(tmp_path / "ours" / name), load_file(tmp_path / "theirs" / name)
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)


def test_peft_adds_the_output_projection_twice(tmp_path):
    """PEFT 0.21.2 merges it twice in each forward pass. If this fails, files need B, not B / 2."""
    base = Attention()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["own"], lora_alpha=4)
    )
    attention = theirs.base_model.model.own
    lora = attention.base_layer.out_proj
    with torch.no_grad():
        lora.lora_B["default"].weight.normal_(std=0.2)
        change = lora.lora_B["default"].weight @ lora.lora_A["default"].weight
        plain = copy.deepcopy(base.own)
        plain.out_proj.weight += 2 * change
    x = inputs(base)[0]
    assert_gap(attention(x, x, x)[0], plain(x, x, x)[0], 1e-5)


@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_variants_that_peft_lacks_are_read_by_ours_alone(variant, tmp_path):
    base = Attention()
    x = inputs(base)
    model = train(adapt(base, init_lora_weights="pissa", **{variant: True}), size=0.2)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert_gap(LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)(*x), model(*x), 2 * EXACT)


# -- refusals --------------------------------------------------------------------------------------


class OwnAttention(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            lambda: nn.MultiheadAttention(16, 2, kdim=8),
            "kdim=8 and vdim=16: both must be embed_dim",
        ),
        (lambda: OwnAttention(16, 2), "is a OwnAttention, a subclass of nn.MultiheadAttention"),
        (lambda: nn.MultiheadAttention(16, 2, device="meta"), "in_proj_weight is not in memory"),
    ],
)
def test_other_attention_is_refused_by_name(module, message):
    base = nn.ModuleDict({"plain": nn.MultiheadAttention(16, 2), "odd": module()})
    kinds = {name: type(child) for name, child in base.items()}
    with pytest.raises(TypeError, match=f"target 'odd' .*{message}.*Leave it out with exclude"):
        get_peft_model(base, LoraConfig(r=4, target_modules=["plain", "odd"]))
    assert {name: type(child) for name, child in base.items()} == kinds


def test_an_error_leaves_the_model_as_it_was():
    base = Attention()
    before = snapshot(base)
    with pytest.raises(ValueError, match="'own.in_proj': rank 40 exceeds min"):
        get_peft_model(base, LoraConfig(r=40, target_modules=["own"], init_lora_weights="pissa"))
    assert_unchanged(base, before)
    assert type(base.own) is nn.MultiheadAttention
