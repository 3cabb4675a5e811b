"""Small seeded models of real architectures, and batches for them.

Four transformers architectures, built from their configurations (nothing is downloaded), and a
block of a diffusion model.
"""

import copy
import functools
import math

import torch
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

VOCABULARY = 96


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
        from lora_init.calibration.batches import (
            forward,  # not on top: lora_init may import `checked`
        )

        output = forward(model, batch)
        if not isinstance(output, tuple):
            output = (getattr(output, "logits", output),)
        return sum(part.float().square().mean() for part in output)


def data_of(spec, batches):
    """The batches as the method of `spec` takes them: a dict where it compares sets, else as given.

    The other sets hold the first half of each batch. None for a method that needs no data.
    """
    request = spec.request(spec.options())
    if request is None or batches is None:
        return None
    if not request.sets or isinstance(batches, dict):
        return batches
    later = batches
    if isinstance(batches, list):
        later = Batches(map(half, batches))
    elif isinstance(getattr(batches, "batches", None), list):  # WithLoss
        later = type(batches)([half(batch) for batch in batches.batches], batches.loss)
    return {name: later if number else batches for number, name in enumerate(request.sets)}


def half(batch):
    if isinstance(batch, dict):
        return {key: half(value) for key, value in batch.items()}
    return batch[: max(1, len(batch) // 2)]


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


class ConvTower(nn.Module):
    """Two convolutions of one or three dimensions, as of audio and of videos."""

    def __init__(self, dimensions):
        super().__init__()
        torch.manual_seed(0)
        kind = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
        self.first = kind(4, 12, 3, padding=1)
        self.second = kind(12, 8, (3, 2, 1)[:dimensions], stride=2)
        self.eval()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def tower_batches(dimensions):
    generator = torch.Generator().manual_seed(1)
    size = (2, 4, 9, 6, 5)[: dimensions + 2]
    return Batches({"x": torch.randn(size, generator=generator)} for _ in range(2))


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
