"""Adapters on embeddings, against a table of rows: plain, padded, and scaled word embeddings."""

import copy
from itertools import product

import pytest
import torch
from measures import EPSILON, assert_gap, logits, train
from methods import SPECS, handling, one_of_each
from models import VOCABULARY, gpt2, spread_weight, token_batches
from products import thinned
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lora_init import LoraConfig, get_peft_model

METHODS = [name for name, spec in SPECS.items() if "Embedding" in spec.module_types]
ENTRIES, WIDTH, SCALE = 30, 12, 4.0


def plain():
    return nn.Embedding(ENTRIES, WIDTH)


def padded():
    return nn.Embedding(ENTRIES, WIDTH, padding_idx=3)


def bart():
    return BartScaledWordEmbedding(ENTRIES, WIDTH, padding_idx=3, embed_scale=SCALE)


def gemma():
    return Gemma3TextScaledWordEmbedding(ENTRIES, WIDTH, padding_idx=3, embed_scale=SCALE)


SCALES = {plain: 1.0, padded: 1.0, bart: SCALE, gemma: SCALE}
every_embedding = pytest.mark.parametrize("make", SCALES, ids=lambda make: make.__name__)
every_variant = pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
IDS = torch.tensor([[0, 3, 7, 7], [29, 1, 3, 12]])


def network(make, dtype=torch.float32):
    base = nn.Sequential(make())
    with torch.no_grad():
        base[0].weight.copy_(spread_weight(ENTRIES, WIDTH))
    return base.to(dtype)


def adapt(base, **settings):
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **settings))


@pytest.mark.parametrize(
    ("make", "method", "dtype", "use_dora"),
    thinned(
        list(product(SCALES, METHODS, [torch.float32, torch.bfloat16], [False, True])),
        lambda make, method, dtype, use_dora: method,
        lambda make, method, dtype, use_dora: (handling(method), make),
        lambda make, method, dtype, use_dora: (handling(method), dtype, use_dora),
        lambda make, method, dtype, use_dora: (make, dtype, use_dora),
    ),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_output_is_a_row_of_the_table(make, method, dtype, use_dora):
    base = network(make, dtype)
    model = adapt(copy.deepcopy(base), init_lora_weights=method, use_dora=use_dora)
    layer = model.layers["0"]
    if SPECS[method].preserves_output:
        assert_gap(model(IDS), base(IDS), EPSILON[dtype])
    train(model, size=0.2)
    table = layer.base_layer.weight.detach().double()
    table = table + layer.scaling * (layer.output_factor.double() @ layer.lora_A.double()).T
    if layer.base_state == "in_forward":
        initial = layer.initial_lora_B.double() @ layer.initial_lora_A.double()
        table = table - layer.scaling * initial.T
    if use_dora:
        table = table * layer.lora_magnitude_vector.double() / table.norm(dim=0)
    expected = SCALES[make] * table[IDS]
    assert_gap(model(IDS), expected, 3 * EPSILON[dtype])
    merged = model.merge_and_unload()
    assert type(merged[0]) is type(base[0])
    assert_gap(merged(IDS), expected, 3 * EPSILON[dtype])


@every_variant
@every_embedding
def test_the_padding_entry_is_not_trained(make, use_dora):
    """The embedding's own rule: its padding row gets no gradient, whatever the ids."""
    model = train(adapt(network(make), init_lora_weights="random", use_dora=use_dora))
    layer = model.layers["0"]
    model(IDS).pow(2).sum().backward()
    padding = layer.base_layer.padding_idx
    gradient = layer.lora_A.grad.abs().amax(0)
    for entry in IDS.unique().tolist():
        assert (gradient[entry] == 0) == (entry == padding), entry


def test_no_dropout_on_ids():
    base = network(plain)
    model = train(adapt(base, init_lora_weights="random", lora_dropout=0.5)).train()
    assert torch.equal(model(IDS), model(IDS))


@pytest.mark.parametrize("method", one_of_each(METHODS))
def test_embedding_and_tied_head_together(method):
    """Two adapters on one shared weight: each its own, and the weight stays what it is."""
    base, batches = gpt2(), token_batches()
    original, ids = logits(base, batches), torch.arange(VOCABULARY)
    rows = base.transformer.wte(ids)
    tied = base.transformer.wte.weight
    config = LoraConfig(r=4, target_modules=["wte", "lm_head"], init_lora_weights=method)
    model = get_peft_model(base, config)
    spec = model.plan.initializer
    if spec.preserves_output:
        assert_gap(base.transformer.wte(ids), rows, EPSILON[torch.float32])
        assert_gap(logits(model, batches), original, 1e-5)
        assert model.layers["lm_head"].base_layer.weight is tied
    train(model)
    trained = logits(model, batches)
    if spec.base != "replace":
        with model.disable_adapter():
            assert_gap(logits(model, batches), original, 0.0)
    model.merge_adapter()
    assert_gap(logits(model, batches), trained, 1e-5)
    model.unmerge_adapter()
    restored = model.unload()
    assert restored.lm_head.weight is restored.transformer.wte.weight is tied
    assert_gap(logits(restored, batches), original, 0.0)
