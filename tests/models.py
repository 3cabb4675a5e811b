"""Small seeded models, and the few measures that several tests take of them.

Four transformers architectures, built from their configurations (nothing is downloaded), and, for
what needs no architecture, networks of two or three layers of one module type: `Case` builds them.
"""

import copy
import functools
import math
from typing import NamedTuple

import bitsandbytes
import torch
from beartype import BeartypeConf, beartype
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""What `pytest --check-shapes` decorates every function of lora_init with; an int is a float."""

VOCABULARY = 96
EPSILON = {
    torch.float32: 2e-6,  # the promised figure, not float32's epsilon
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}


# -- transformers ----------------------------------------------------------------------------------


def built_once(make):
    """Copies of what `make` builds at its first call, with the global draws left as it leaves them.

    A copy takes a quarter of the time that transformers needs to build a model of a few layers.
    """

    @functools.cache
    def original(*arguments, **named):
        return make(*arguments, **named), torch.get_rng_state()

    @functools.wraps(make)
    def copied(*arguments, **named):
        model, draws = original(*arguments, **named)
        torch.set_rng_state(draws)
        return copy.deepcopy(model)

    return copied


@built_once
def llama(tied=False, seed=0):
    """Grouped heads: q_proj is 64 x 64, k_proj and v_proj are 32 x 64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return spread(LlamaForCausalLM(config)).eval()


@built_once
def gpt2(seed=0):
    """Conv1D layers; c_attn is wide, attn.c_proj is square, lm_head is tied to wte."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=48, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return spread(GPT2LMHeadModel(config)).eval()


@built_once
def bert(seed=0, labels=3):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=64,
        num_labels=labels,
    )
    return spread(BertForSequenceClassification(config)).eval()


@built_once
def t5(seed=0):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return spread(T5ForConditionalGeneration(config)).eval()


def spread(model):
    """Give every matrix a decaying spectrum and a trained weight's size, ties included.

    Fresh weights are so small (0.02) that logits hardly depend on them, and their flat spectra hide
    a decomposition that takes the wrong triplets.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(spread_weight(*parameter.shape).to(parameter.dtype))
    return model


def spread_weight(rows, columns, generator=None):
    """(rows, columns), singular values 1, 2^-0.7, 3^-0.7 …, Frobenius norm of sqrt(rows)."""
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator))[0]
    weight = (left * torch.arange(1, size + 1) ** -0.7) @ right.T
    return weight * math.sqrt(rows) / weight.norm()


class Batches(list):
    """Calibration data of every method: the models here get no labels, so they bring a loss along.

    It is the mean square of all that a model returns.
    """

    @staticmethod
    def loss(model, batch):
        from lora_init.batches import forward  # not on top: lora_init may import `checked`

        output = forward(model, batch)
        if not isinstance(output, tuple):
            output = (getattr(output, "logits", output),)
        return sum(part.float().square().mean() for part in output)


def token_batches(count=3, size=4, length=12, *, padded=True, seed=0):
    """Batches of token ids with right padding of different lengths and their attention masks."""
    generator = torch.Generator().manual_seed(seed)
    batches = Batches()
    for _ in range(count):
        ids = torch.randint(1, VOCABULARY, (size, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            for row in range(size):
                mask[row, length - 2 * row :] = 0
            ids = ids * mask
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def t5_batches(**options):
    encoder, decoder = token_batches(**options), token_batches(seed=1, **options)
    return Batches(
        e | {"decoder_input_ids": d["input_ids"], "decoder_attention_mask": d["attention_mask"]}
        for e, d in zip(encoder, decoder, strict=True)
    )


@torch.no_grad()
def logits(model, batches):
    """Logits of all batches; without dropout, at unmasked positions as at masked ones."""
    model.eval()
    return [model(**batch).logits for batch in batches]


# -- networks of one module type -------------------------------------------------------------------

SHAPES = {"square": (32, 32), "tall": (56, 32), "wide": (24, 56)}
# What bitsandbytes packs for a CPU without a loss: whole blocks of 64 a row, groups of 32 rows.
PACKED_SHAPES = {"square": (64, 64), "tall": (128, 64), "wide": (32, 128)}
CONVOLUTION_SHAPES = {"square": (8, 36), "strided": (12, 48), "dilated": (8, 108)}
IN_CHANNELS = {"square": 4, "strided": 8, "dilated": 12}
EMBEDDING_SHAPES = {"words": (16, 40), "kinds": (16, 12)}
PACKED_KINDS = ("Linear4bit", "Linear8bitLt")


class Chain(nn.Module):
    """square, tall, wide: an out x in for every case, of `SHAPES` or, if packed, `PACKED_SHAPES`.

    A packed chain and a float one of the same shapes and seed have the same original weights.
    """

    def __init__(self, kind="Linear", dtype=torch.float32, seed=0, shapes=None):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = shapes or (PACKED_SHAPES if kind in PACKED_KINDS else SHAPES)
        for name, (rows, columns) in shapes.items():
            weight = spread_weight(rows, columns, generator)
            bias = 0.1 * torch.randn(rows, generator=generator)
            self.add_module(name, linear(kind, weight, bias))
        if kind not in PACKED_KINDS:
            self.to(dtype)

    def forward(self, x):
        return self.wide(torch.tanh(self.tall(torch.tanh(self.square(x)))))


def linear(kind, weight, bias=None, **settings):
    """A module of a linear type that holds `weight` (out, in); settings are bitsandbytes'."""
    rows, columns = weight.shape
    with_bias = bias is not None
    if kind == "Linear":
        module = nn.Linear(columns, rows, bias=with_bias)
    elif kind == "Conv1D":
        module = Conv1D(rows, columns)
        weight = weight.T
    elif kind == "Linear4bit":
        settings = {"quant_type": "nf4", "compress_statistics": True} | settings
        module = bitsandbytes.nn.Linear4bit(columns, rows, bias=with_bias, **settings)
    else:
        settings = {"has_fp16_weights": False} | settings
        module = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=with_bias, **settings)
    with torch.no_grad():
        module.weight.copy_(weight)
        if with_bias:
            module.bias.copy_(bias)
    return module.to("cpu")  # which is when bitsandbytes quantises


class Pictures(nn.Module):
    """Three convolutions: padded; strided with a flat kernel; dilated, reflecting, without bias."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.square = nn.Conv2d(4, 8, 3, padding=1)
        self.strided = nn.Conv2d(
            8, 12, (3, 2), stride=(2, 1), padding=(0, 1), padding_mode="circular"
        )
        self.dilated = nn.Conv2d(
            12, 8, 3, dilation=2, padding="same", padding_mode="reflect", bias=False
        )
        with torch.no_grad():
            for name, shape in CONVOLUTION_SHAPES.items():
                module = self.get_submodule(name)
                module.weight.copy_(spread_weight(*shape, generator).view(module.weight.shape))
                if module.bias is not None:
                    module.bias.copy_(0.1 * torch.randn(shape[0], generator=generator))
        self.to(dtype)

    def forward(self, x):
        return self.dilated(torch.tanh(self.strided(torch.tanh(self.square(x)))))


class Words(nn.Module):
    """Two embeddings: of many entries, one of them padding, and of fewer than its width."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.words = nn.Embedding(40, 16, padding_idx=0)
        self.kinds = nn.Embedding(12, 16)
        with torch.no_grad():
            for name, shape in EMBEDDING_SHAPES.items():
                self.get_submodule(name).weight.copy_(spread_weight(*shape, generator).T)
        self.to(dtype)

    def forward(self, ids):
        return torch.tanh(self.words(ids)) + torch.tanh(self.kinds(ids % 12))


class Case(NamedTuple):
    """A base to adapt: a network whose layers are all of one module type, and its inputs."""

    kind: str = "Linear"
    dtype: torch.dtype = torch.float32

    def __str__(self):
        return f"{self.kind}-{str(self.dtype)[6:]}"

    @property
    def packed(self):
        return self.kind in PACKED_KINDS

    @property
    def shapes(self):
        """The layers' (out, in), in the model's order."""
        if self.packed:
            return PACKED_SHAPES
        return {"Conv2d": CONVOLUTION_SHAPES, "Embedding": EMBEDDING_SHAPES}.get(self.kind, SHAPES)

    def build(self, seed=0):
        return copy.deepcopy(built(self, seed))

    def originals(self, seed=0):
        """The weights that a packed network was quantised from, else None."""
        return Chain(seed=seed, shapes=PACKED_SHAPES).state_dict() if self.packed else None

    def inputs(self, rows=30, seed=1):
        """Inputs of the whole network."""
        return self.layer_inputs(next(iter(self.shapes)), rows, seed)

    def layer_inputs(self, name, rows=50, seed=21):
        columns = self.shapes[name][1]
        if self.kind == "Embedding":
            generator = torch.Generator().manual_seed(seed)
            return torch.randint(columns, (rows, 5), generator=generator)
        if self.kind == "Conv2d":
            channels = IN_CHANNELS[name]
            size = 8 * 7 * channels
            return chain_inputs(rows // 5, size, self.dtype, seed).view(-1, channels, 8, 7)
        return chain_inputs(rows, columns, self.dtype, seed)

    def calibration(self):
        return Batches(self.inputs(40, seed) for seed in (11, 12, 13))


@functools.cache  # a copy takes a third of the time
def built(case, seed):
    with torch.random.fork_rng(devices=[]):  # the global draws do not depend on who builds first
        if case.kind == "Conv2d":
            return Pictures(case.dtype, seed)
        if case.kind == "Embedding":
            return Words(case.dtype, seed)
        return Chain(case.kind, case.dtype, seed)


def kept_plain(model):
    """A copy whose 4-bit modules bitsandbytes does not repack: what an adapter's base computes.

    The repacked module computes in bfloat16, from scales that are rounded to it.
    """
    from lora_init.packed import is_packed, keep_plain  # not on top: lora_init may import `checked`

    twin = copy.deepcopy(model)
    for module in twin.modules():
        if is_packed(module):
            keep_plain(module)
    return twin


def on_device(model, device):
    """`model.to(device)`, and what it leaves behind: the scales of weights quantised to 8 bits.

    bitsandbytes hangs codes and scales on a new parameter, of which torch takes the data only.
    """
    model.to(device)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt) and module.weight.CB is not None:
            weight = module.weight
            weight.CB, weight.SCB = weight.data, weight.SCB.to(device)
    return model


@torch.no_grad()
def without_bias(module, x):
    """W x as the module computes it, the scale of the tolerances; float64."""
    result = module(x).double()
    bias = getattr(module, "bias", None)
    if bias is None:
        return result
    return result - (bias[:, None, None] if isinstance(module, nn.Conv2d) else bias)


def chain_inputs(rows, columns=SHAPES["square"][1], dtype=torch.float32, seed=1):
    """Correlated inputs with a mean, as activations are; shape (rows, columns)."""
    return drawn_inputs(rows, columns, seed).to(dtype, copy=True)


@functools.cache  # the mixing matrix of a few hundred columns takes longer than many a test
def drawn_inputs(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = spread_weight(columns, columns, generator)
    mean = 0.3 * torch.randn(columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) @ mix + mean


def chain_calibration(dtype=torch.float32):
    return Batches(chain_inputs(40, dtype=dtype, seed=seed) for seed in (11, 12, 13))


# -- measures --------------------------------------------------------------------------------------


def norm_ratio(model, base, name):
    """max(1, ‖s B0 A0‖ / ‖W‖) of one layer: the factor in the promised tolerances."""
    from lora_init.modules import oriented_weight

    layer = model.layers[name]
    if layer.initial_lora_A is None:
        return 1.0
    product = layer.scaling * layer.initial_lora_B.double() @ layer.initial_lora_A.double()
    weight = oriented_weight(base.get_submodule(name)).double()
    return max(1.0, float(product.norm() / weight.norm()))


def largest_ratio(model, base):
    return max(norm_ratio(model, base, name) for name in model.layers)


def relative_gap(actual, expected, scale=None):
    """‖actual - expected‖ / ‖scale‖ in float64; of lists: the largest."""
    if isinstance(actual, list):
        return max(relative_gap(a, e) for a, e in zip(actual, expected, strict=True))
    scale = expected if scale is None else scale
    difference = actual.detach().double() - expected.detach().double()
    return float(difference.norm() / scale.detach().double().norm())


def assert_gap(actual, expected, tolerance, scale=None):
    gap = relative_gap(actual, expected, scale)
    assert gap <= tolerance, f"relative gap {gap:.2e}, allowed {tolerance:.2e}"


def train(model, size=0.05, seed=5):
    """Move every trainable tensor by noise of `size` times its own scale: a stand-in for training.

    Zero tensors (B at step 0) move by `size` times the scale of a 1/sqrt(rank) entry.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                scale = float(parameter.float().pow(2).mean().sqrt()) or parameter.shape[-1] ** -0.5
                parameter.add_((size * scale * noise).to(parameter))
    return model


def snapshot(model):
    """Everything a failed call must leave alone: tensors, modules, flags, modes, hooks."""
    return {
        "state": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "modules": {n: id(m) for n, m in model.named_modules(remove_duplicate=False)},
        "flags": {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after["state"].keys() == before["state"].keys()
    for name, value in before["state"].items():
        same = after["state"][name]
        assert value.dtype == same.dtype, name
        assert torch.equal(value, same), f"{name} changed by {(value - same).abs().max():.1e}"
    for part in ("modules", "flags", "training", "hooks"):
        assert after[part] == before[part], part


# -- further modules -------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """A residual block of a diffusion model: two convolutions, a time embedding, a shortcut."""

    def __init__(self, channels=18, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.norm1 = nn.GroupNorm(3, channels)
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.time_emb_proj = nn.Linear(20, 16)
        self.norm2 = nn.GroupNorm(4, 16)
        self.conv2 = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, 16, 1, stride=2)
        spread(self).eval()

    def forward(self, hidden_states, temb):
        hidden = self.conv1(nn.functional.silu(self.norm1(hidden_states)))
        hidden = hidden + self.time_emb_proj(nn.functional.silu(temb))[:, :, None, None]
        hidden = self.conv2(nn.functional.silu(self.norm2(hidden)))
        return self.conv_shortcut(hidden_states) + hidden


def image_batches(count=3, size=4, channels=18, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batches(
        {
            "hidden_states": torch.randn(size, channels, 8, 8, generator=generator),
            "temb": torch.randn(size, 20, generator=generator),
        }
        for _ in range(count)
    )


def packed(model, kind, skip=("lm_head", "classifier")):
    """Exchange the linear layers for bitsandbytes' own, as transformers does when it loads a model.

    Args:
        kind: "nf4", "fp4", either with " double", or "int8". 4-bit modules are kept from repacking,
            which rounds their scales on some CPUs.
        skip: last parts of the names of layers that stay as they are.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from lora_init.packed import keep_plain

    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or path.rpartition(".")[2] in skip:
            continue
        sizes, bias = (module.in_features, module.out_features), module.bias is not None
        if kind == "int8":
            new = Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
        else:
            name, *double = kind.split()
            new = Linear4bit(
                *sizes, bias=bias, compute_dtype=torch.float32, quant_type=name,
                compress_statistics=bool(double),
            )  # fmt: skip
        new.load_state_dict(module.state_dict())
        new = new.to("cpu").requires_grad_(False).eval()
        keep_plain(new)
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    setattr(model, f"is_loaded_in_{'8' if kind == 'int8' else '4'}bit", True)  # what PEFT looks at
    return model
