"""Small seeded models, and the few measures that several tests take of them.

Four transformers architectures, built from their configurations (nothing is downloaded), and
`Chain`, three layers of different shapes, for what needs no architecture.
"""

import math

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


def gpt2(seed=0):
    """Conv1D layers; c_attn is wide, attn.c_proj is square, lm_head is tied to wte."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=48, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return spread(GPT2LMHeadModel(config)).eval()


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


def token_batches(count=3, size=4, length=12, *, padded=True, seed=0):
    """Batches of token ids with right padding of different lengths and their attention masks."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
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
    return [
        e | {"decoder_input_ids": d["input_ids"], "decoder_attention_mask": d["attention_mask"]}
        for e, d in zip(encoder, decoder, strict=True)
    ]


@torch.no_grad()
def logits(model, batches):
    """Logits of all batches; without dropout, at unmasked positions as at masked ones."""
    model.eval()
    return [model(**batch).logits for batch in batches]


# -- a chain of three layers -----------------------------------------------------------------------

SHAPES = {"square": (32, 32), "tall": (56, 32), "wide": (24, 56)}


class Chain(nn.Module):
    """square (32 x 32), tall (56 x 32), wide (24 x 56): an out x in for every case."""

    def __init__(self, kind="Linear", dtype=torch.float32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, (rows, columns) in SHAPES.items():
            layer = nn.Linear(columns, rows) if kind == "Linear" else Conv1D(rows, columns)
            weight = spread_weight(rows, columns, generator)
            with torch.no_grad():
                layer.weight.copy_(weight if kind == "Linear" else weight.T)
                layer.bias.copy_(0.1 * torch.randn(rows, generator=generator))
            self.add_module(name, layer)
        self.to(dtype)

    def forward(self, x):
        return self.wide(torch.tanh(self.tall(torch.tanh(self.square(x)))))


def chain_inputs(rows, columns=SHAPES["square"][1], dtype=torch.float32, seed=1):
    """Correlated inputs with a mean, as activations are; shape (rows, columns)."""
    generator = torch.Generator().manual_seed(seed)
    mix = spread_weight(columns, columns, generator)
    mean = 0.3 * torch.randn(columns, generator=generator)
    return (torch.randn(rows, columns, generator=generator) @ mix + mean).to(dtype)


def chain_calibration(dtype=torch.float32):
    return [chain_inputs(40, dtype=dtype, seed=seed) for seed in (11, 12, 13)]


# -- measures --------------------------------------------------------------------------------------


def norm_ratio(model, base, name):
    """max(1, ‖s B0 A0‖ / ‖W‖) of one layer: the factor in the promised tolerances."""
    layer = model.layers[name]
    if layer.initial_lora_A is None:
        return 1.0
    product = layer.scaling * layer.initial_lora_B.double() @ layer.initial_lora_A.double()
    weight = base.get_submodule(name).weight.detach().double()
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
                parameter.add_((size * scale * noise).to(parameter.dtype))
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
