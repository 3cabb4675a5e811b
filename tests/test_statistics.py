"""The calibration pass: exact moments, masks, sharing, and a model left as it was."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_init.registry import CalibrationRequest
from lora_init.statistics import collect

PLAIN = CalibrationRequest()


class Record:
    """Every input of a module, as the module saw it: the reference that hooks are held against."""

    def __init__(self, model, names):
        self.inputs = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: self.inputs[name].append(args[0].clone())
            )

    def moments(self, name, masks=None):
        rows = [
            (x if masks is None else x[mask]).reshape(-1, x.shape[-1]).double()
            for x, mask in zip(self.inputs[name], masks or self.inputs[name], strict=True)
        ]
        x = torch.cat(rows)
        return x.T @ x / len(x), x.mean(0), len(x)


def agrees(statistics, reference):
    second_moment, mean, tokens = reference
    inputs = statistics.inputs
    assert inputs.tokens == tokens
    error = torch.linalg.matrix_norm(inputs.second_moment - second_moment)
    assert error <= 1e-5 * torch.linalg.matrix_norm(second_moment)
    torch.testing.assert_close(inputs.mean.double(), mean, rtol=1e-4, atol=1e-5)
    return True


@pytest.fixture
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=50,
    )
    return BertForSequenceClassification(config)


def padded_batches(count=3, length=9, **fields):
    generator = torch.Generator().manual_seed(1)
    batches = []
    for index in range(count):
        ids = torch.randint(0, 50, (4, length + index), generator=generator)
        lengths = torch.randint(2, length, (4,), generator=generator)
        mask = (torch.arange(length + index) < lengths[:, None]).long()
        batches.append({"input_ids": ids, "attention_mask": mask, **fields})
    return batches


def test_moments_of_unmasked_tokens_over_batches_of_any_size(bert):
    names = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"]
    batches = padded_batches()
    record = Record(bert, names)
    calibration = collect(bert, names, PLAIN, iter(batches))
    masks = [batch["attention_mask"].bool() for batch in batches]
    for name in names:
        assert agrees(calibration.layers[name], record.moments(name, masks))
    assert calibration.tokens == sum(int(mask.sum()) for mask in masks)
    assert calibration.batches == 3


def test_an_input_of_another_shape_counts_every_row(bert):
    names = ["bert.pooler.dense"]
    record = Record(bert, names)
    calibration = collect(bert, names, PLAIN, padded_batches())
    assert agrees(calibration.layers[names[0]], record.moments(names[0]))


def test_sequence_labels_mask_nothing(bert):
    names = ["bert.encoder.layer.0.attention.self.query"]
    request = CalibrationRequest(ignore_label=-100)
    with_labels = padded_batches(labels=torch.tensor([0, 1, 1, 0]))
    plain = collect(bert, names, request, padded_batches()).layers[names[0]].inputs
    labelled = collect(bert, names, request, with_labels).layers[names[0]].inputs
    assert torch.equal(plain.second_moment, labelled.second_moment)


def test_layers_that_read_one_tensor_share_one_sum(bert):
    attention = "bert.encoder.layer.0.attention.self"
    names = [f"{attention}.{part}" for part in ("query", "key", "value")]
    layers = collect(bert, names, PLAIN, padded_batches()).layers
    assert layers[names[0]].inputs is layers[names[1]].inputs is layers[names[2]].inputs


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=50,
    )
    return LlamaForCausalLM(config)


def test_token_labels_are_left_out_where_the_method_says_so():
    model = llama()
    names = ["model.layers.0.self_attn.q_proj"]
    batches = padded_batches()
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] % 3 == 0, -100)
    record = Record(model, names)
    calibration = collect(model, names, CalibrationRequest(ignore_label=-100), batches)
    masks = [b["attention_mask"].bool() & (b["labels"] != -100) for b in batches]
    assert agrees(calibration.layers[names[0]], record.moments(names[0], masks))
    everything = collect(model, names, PLAIN, batches).layers[names[0]].inputs
    assert everything.tokens > calibration.layers[names[0]].inputs.tokens


def test_encoder_and_decoder_use_their_own_masks():
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=1, vocab_size=50,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    names = [
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.k",
    ]
    # Equal lengths on both sides: shapes alone could not tell the masks apart.
    batch = padded_batches(count=1)[0]
    encoder_mask = batch["attention_mask"].bool()
    decoder_mask = encoder_mask.flip(0)
    labels = torch.randint(0, 50, encoder_mask.shape)
    labels[:, -4:] = -100
    batch |= {"decoder_attention_mask": decoder_mask.long(), "labels": labels}
    record = Record(model, names)
    calibration = collect(model, names, CalibrationRequest(ignore_label=-100), [batch])
    decoder_rows = decoder_mask & (labels != -100)
    for name, mask in zip(
        names, (encoder_mask, decoder_rows, decoder_rows, encoder_mask), strict=True
    ):
        assert agrees(calibration.layers[name], record.moments(name, [mask])), name


class Moody(nn.Module):
    """Two layers that share their input in some batches only, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, split):
        self.a(x)
        self.b(x * 2 if split else x)
        self.twice(x)
        self.twice(x)


def test_sharing_that_changes_between_batches_is_summed_correctly():
    torch.manual_seed(0)
    model = Moody()
    batches = [[torch.randn(3, 4), split] for split in (False, True, False)]
    record = Record(model, ["a", "b", "twice"])
    layers = collect(model, ["a", "b", "twice"], PLAIN, batches).layers
    for name in ("a", "b", "twice"):
        assert agrees(layers[name], record.moments(name))
    assert layers["a"].inputs is not layers["b"].inputs


def test_the_model_is_left_as_it_was(bert):
    bert.train()
    bert.bert.pooler.eval()
    before = {name: module.training for name, module in bert.named_modules()}
    state = {key: value.clone() for key, value in bert.state_dict().items()}
    hooks = sum(len(module._forward_pre_hooks) for module in bert.modules())
    collect(bert, ["bert.pooler.dense"], PLAIN, padded_batches())
    assert {name: module.training for name, module in bert.named_modules()} == before
    assert sum(len(module._forward_pre_hooks) for module in bert.modules()) == hooks
    assert all(torch.equal(value, state[key]) for key, value in bert.state_dict().items())
    with pytest.raises(ValueError, match="input_ids"):
        collect(bert, ["bert.pooler.dense"], PLAIN, [{"no_such_argument": 1}])
    assert sum(len(module._forward_pre_hooks) for module in bert.modules()) == hooks
    assert bert.training


def test_an_endless_or_empty_or_unused_input_is_refused_by_name(bert):
    with pytest.raises(ValueError, match="gave no batch"):
        collect(bert, ["bert.pooler.dense"], PLAIN, iter([]))
    bert.unused = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"no token reached the target 'unused'.*exclude_modules"):
        collect(bert, ["unused"], PLAIN, padded_batches())


def test_a_non_finite_activation_is_refused_by_name(bert):
    name = "bert.encoder.layer.1.attention.self.query"
    with torch.no_grad():
        bert.bert.encoder.layer[0].output.dense.bias[0] = float("nan")
    with pytest.raises(ValueError, match=f"{name}.*not finite"):
        collect(bert, [name], PLAIN, padded_batches())


def test_a_masked_position_may_hold_anything():
    model = nn.Sequential(nn.Linear(4, 4))

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, attention_mask):
            return self.inner(x)

    x = torch.ones(1, 3, 4)
    x[0, 2] = float("nan")
    batch = {"x": x, "attention_mask": torch.tensor([[1, 1, 0]])}
    inputs = collect(Wrapper(), ["inner.0"], PLAIN, [batch]).layers["inner.0"].inputs
    assert torch.equal(inputs.second_moment, torch.ones(4, 4))


def test_components_are_computed_once_for_all_who_share_them():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(6, 3))
    inputs = collect(model, ["0"], PLAIN, [x]).layers["0"].inputs
    values, vectors, total = inputs.principal_components(4, center=True)
    fewer, _, _ = inputs.principal_components(2, center=True)
    centred = x.double() - x.double().mean(0)
    expected = torch.linalg.eigvalsh(centred.T @ centred / len(x)).flip(0)
    torch.testing.assert_close(values.double(), expected[:4], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(float(total), float(expected.sum()), rtol=1e-5, atol=0)
    assert torch.equal(fewer, values[:2])
    assert vectors.shape == (6, 4)
