"""Padding counts nowhere: one padded batch gives the statistics of its unpadded rows."""

import pytest
import torch
from mixtures import mixture
from models import VOCABULARY, bert, llama, t5
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
)

from lora_init import LoraConfig, calibrate
from lora_init.calibration.token_rows import TokenRows

LENGTHS = (7, 4)


def opt(**settings):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32, init_std=0.12, **settings,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def bart():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, init_std=0.12,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


class Flattening(nn.Module):
    """Flat, per-head and plain layers, and one that reads a table as long as a batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, 16)
        self.table = nn.Parameter(torch.randn(2 * max(LENGTHS), 16))
        self.plain, self.flat, self.heads = (nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(4, 4))

    def forward(self, input_ids, attention_mask=None):
        x = self.plain(self.words(input_ids))
        x = self.flat(x.reshape(-1, 16)).view(x.shape).tanh()
        return self.heads(x.view(*x.shape[:2], 4, 4)) + self.plain(self.table).sum()


MODELS = {
    "opt": opt,
    "opt after norm": lambda: opt(do_layer_norm_before=False),
    "qwen2_moe": lambda: mixture("qwen2_moe"),
    "deepseek_v3": lambda: mixture("deepseek_v3"),
    "mixtral": lambda: mixture("mixtral"),
    "llama": llama,
    "bert": bert,
    "t5": t5,
    "bart": bart,
}


def batches(model, padded):
    """A batch of two padded texts, or both alone; with a decoder's texts where there is one."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, VOCABULARY, (1, n), generator=generator) for n in LENGTHS]
    answers = [torch.randint(1, VOCABULARY, (1, n), generator=generator) for n in LENGTHS[::-1]]
    fields = {"input_ids": texts}
    if getattr(model.config, "is_encoder_decoder", False):
        fields["decoder_input_ids"] = answers
    if not padded:
        return [{name: rows[i] for name, rows in fields.items()} for i in range(len(texts))]
    batch = {}
    for name, rows in fields.items():
        ids = torch.zeros(len(rows), max(LENGTHS), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : row.shape[1]], mask[i, : row.shape[1]] = row, 1
        batch |= {name: ids, name.replace("input_ids", "attention_mask"): mask}
    return [batch]


def moments(model, padded, targets="all-linear"):
    task = "SEQ_CLS" if "Sequence" in type(model).__name__ else None
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights="corda", task_type=task)
    found = calibrate(model, config, batches(model, padded))
    return {name: each.inputs for name, each in next(iter(found.requests.values())).items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_one_padded_batch_gives_the_statistics_of_its_texts(kind):
    model = MODELS[kind]()
    together, alone = moments(model, True), moments(model, False)
    assert together.keys() == alone.keys()
    for name, expected in alone.items():
        assert together[name].tokens == expected.tokens, name
        gap = torch.linalg.matrix_norm(together[name].second_moment - expected.second_moment)
        assert gap <= 1e-4 * torch.linalg.matrix_norm(expected.second_moment), name


def test_layers_that_reshape_count_their_tokens_rows():
    model = Flattening()
    model.config = type("Config", (), {})()
    found = moments(model, True)
    assert found["flat"].tokens == sum(LENGTHS)
    assert found["heads"].tokens == 4 * sum(LENGTHS)
    # The table has as many rows as the batch has positions, and none of them is padding.
    assert found["plain"].tokens == sum(LENGTHS) + 2 * max(LENGTHS)


MASK = torch.Size([2, 3])
ROWS = torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("reader", "leading", "counted"),
    [
        ("fc1", (2, 3), [0, 1, 3]),
        ("fc1", (6,), [0, 1, 3]),
        ("mlp.shared_expert.up", (6,), [0, 1, 3]),
        ("mlp.shared_experts.0.up", (6,), [0, 1, 3]),
        ("mlp.experts.0.up", (6,), None),
        ("mlp.experts.expert_1.up", (6,), None),
        ("block_sparse_moe.local_experts.2.w1", (6,), None),
        ("vision_tower.fc1", (6,), None),
        ("fc1", (5,), None),
        ("fc1", (3, 2), None),
        ("fc1", (1, 6), None),
        ("fc1", (2, 3, 2), [0, 1, 2, 3, 6, 7]),
        ("fc1", (2, 1, 3), [0, 1, 3]),
        ("fc1", (2, 2, 3), [0, 1, 3, 4, 6, 9]),
        ("fc1", (2, 3, 1), [0, 1, 3]),
        ("pooler", (2,), None),
    ],
)
def test_rows_of_an_input(reader, leading, counted):
    found = TokenRows().counted(reader, torch.Size(leading), MASK, ROWS)
    assert (found if found is None else found.tolist()) == counted


def test_a_layer_of_changing_inputs_reads_no_flat_tokens():
    """Routed rows may be as many as the tokens by chance, and in another order."""
    rows = TokenRows()
    for leading in ((4,), (6,)):
        assert rows.counted("mlp.w1", torch.Size(leading), MASK, ROWS) is None
