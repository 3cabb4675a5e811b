"""Targets that are refused on a sharded base. Nothing changes; the mesh has one process."""

import peft
import pytest
import torch
from models import gpt2, llama, token_batches
from packing import packed
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lora_init import LoraConfig, calibrate, get_peft_model, initialize_peft_model

BATCHES = token_batches(count=1)


@pytest.fixture
def mesh(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def whole_model(model, mesh):
    return fully_shard(model, mesh=mesh)


def first_layer(model, mesh):
    fully_shard(model.model.layers[0], mesh=mesh)


def each_query(model, mesh):
    for layer in model.model.layers:
        fully_shard(layer.self_attn.q_proj, mesh=mesh)
    fully_shard(model, mesh=mesh)


def by_outputs(model, mesh):
    for layer in model.model.layers:
        parallelize_module(layer, mesh, {"self_attn.q_proj": ColwiseParallel()})


def by_entries(model, mesh):
    style = RowwiseParallel(input_layouts=torch.distributed.tensor.Replicate())
    parallelize_module(model.model, mesh, {"embed_tokens": style})


def partitioned(model, mesh):
    """A module as DeepSpeed ZeRO-3 leaves it: an empty parameter with an id."""
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight
        weight.ds_id, weight.ds_shape = 7, weight.shape
        weight.data = torch.empty(0)


@pytest.mark.parametrize(
    ("shard", "settings", "message"),
    [
        (first_layer, {}, "layers.1.self_attn.q_proj' is not supported: it is outside the modules"),
        (whole_model, {"init_lora_weights": "loftq"}, "loftq replaces the weight. Call get_peft_m"),
        (whole_model, {"modules_to_save": ["lm_head"]}, "modules_to_save='lm_head' is not suppo"),
        (each_query, {"use_dora": True}, "use_dora=True is not supported for .* by FSDP2"),
        (by_outputs, {"use_dora": True}, "use_dora=True is not .* by tensor parallelism. Call"),
        (by_outputs, {"lora_dropout": 0.1}, "lora_dropout=0.1 is not supported for .*q_proj'"),
        (by_outputs, {"lora_bias": True}, "lora_bias=True is not supported for .*q_proj'"),
        (by_outputs, {"bias": "all"}, "bias='all' is not supported for .*q_proj'"),
        (by_outputs, {"init_lora_weights": "loftq"}, "tensor parallelism, and loftq replaces"),
        (by_outputs, {"init_lora_weights": "lora_ga"}, "'lora_ga' needs gradients, .*q_proj' is"),
        (by_entries, {"target_modules": ["embed_tokens"]}, "it is a Embedding: must be"),
        (partitioned, {"use_dora": True}, "use_dora=True is not supported .* by DeepSpeed ZeRO-3"),
        (partitioned, {"init_lora_weights": "qpissa"}, "by DeepSpeed ZeRO-3, and qpissa replaces"),
        (partitioned, {"init_lora_weights": "corda"}, "'corda' needs a forward pass, .* by Dee"),
    ],
)  # fmt: skip
def test_refused_by_name(mesh, shard, settings, message):
    model = llama()
    shard(model, mesh)
    names = [name for name, _ in model.named_modules()]
    settings = {"target_modules": ["q_proj"], "init_lora_weights": "pissa"} | settings
    with pytest.raises((TypeError, ValueError), match=message):
        get_peft_model(model, LoraConfig(r=2, **settings), calibration=BATCHES)
    assert names == [name for name, _ in model.named_modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_a_forward_of_a_sharded_module_is_refused(mesh):
    model = llama()
    by_outputs(model, mesh)
    module = model.model.layers[0].self_attn.q_proj
    module.forward = lambda x: nn.Linear.forward(module, x).round()
    with pytest.raises(TypeError, match="its weight is sharded, so this forward cannot be probed"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


def test_a_sharded_attention_is_refused(mesh):
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    fully_shard(model, mesh=mesh)
    with pytest.raises(TypeError, match="target '0' is not supported: '0.in_proj_weight' is shar"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))


def test_a_sharded_quantized_weight_is_refused(mesh):
    model = packed(nn.Sequential(nn.Linear(64, 64)), "nf4")
    weight = model[0].weight
    weight.ds_id, weight.ds_shape = 7, weight.shape
    with pytest.raises(TypeError, match="by DeepSpeed ZeRO-3, and it is a quantized Linear4bit. C"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize(
    ("kind", "message", "settings"),
    [
        ("int8", "FSDP2, and fully_shard drops the scales of a Linear8bitLt. Call get_pe", {}),
        ("nf4", "cannot be written, because it is sharded", {"quantized_base": "requantize"}),
    ],
)
def test_what_changes_a_sharded_quantized_weight_is_refused(mesh, kind, message, settings):
    model = packed(nn.Sequential(nn.Linear(64, 64)), kind)
    fully_shard(model, mesh=mesh)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    with pytest.raises(TypeError, match=message):
        get_peft_model(model, config, **settings)
    assert type(model[0].weight.to_local()) is torch.Tensor


def test_a_calibration_of_the_whole_model_fits_a_parallel_one(mesh):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva")
    found = calibrate(llama(), config, BATCHES)
    expected = get_peft_model(llama(), config, calibration=found)
    model = llama()
    by_outputs(model, mesh)
    model = get_peft_model(model, config, calibration=found)
    for name, layer in model.layers.items():
        assert torch.equal(layer.lora_A.full_tensor(), expected.layers[name].lora_A)


@pytest.mark.parametrize(
    ("shard", "reason"),
    [(whole_model, "sharded, a DTensor"), (partitioned, "partitioned by DeepSpeed ZeRO-3")],
)
def test_a_sharded_peft_model_is_refused(mesh, shard, reason):
    """Also by `LoraInitCallback`, which calls this function after a Trainer has sharded."""
    settings = {"r": 2, "target_modules": ["v_proj"]}
    model = peft.get_peft_model(llama(), peft.LoraConfig(**settings))
    shard(model.get_base_model(), mesh)
    before = {name: id(value) for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match=f"is {reason}, and must be whole. Call init"):
        initialize_peft_model(model, "pissa")
    assert before == {name: id(value) for name, value in model.named_parameters()}
    assert not model.get_base_model().model.layers[0].self_attn.v_proj.lora_B.default.weight.any()


def test_ignoring_frozen_parameters_in_a_state_dict_is_refused():
    """torch would remove each frozen base weight, but the state dict has none."""
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    options = StateDictOptions(ignore_frozen_params=True)
    with pytest.raises(ValueError, match="ignore_frozen_params=True is not .*must be False"):
        get_model_state_dict(model, options=options)
    wrapped = nn.ModuleDict({"student": model})
    with pytest.raises(ValueError, match="ignore_frozen_params=True is not .*must be False"):
        get_model_state_dict(wrapped, options=options)
    assert get_model_state_dict(wrapped).keys() == wrapped.state_dict().keys()


@pytest.mark.parametrize(
    "options",
    [{}, {"full_state_dict": True}, {"cpu_offload": True}, {"keep_submodule_prefixes": False},
     {"strict": False}, {"flatten_optimizer_state_dict": True},
     {"full_state_dict": True, "broadcast_from_rank0": True}],
)  # fmt: skip
def test_the_other_options_of_state_dicts_restore_model_and_optimizer(mesh, options):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")

    def trained(steps, seed):
        model = get_peft_model(whole_model(llama(), mesh), config, seed=seed)
        parameters = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for _ in range(steps):
            model(**BATCHES[0]).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.eval(), optimizer

    settings = StateDictOptions(**options)
    model, optimizer = trained(1, seed=0)
    states = get_state_dict(model, optimizer, options=settings)
    other, fresh = trained(0, seed=1)
    set_state_dict(
        other, fresh, model_state_dict=states[0], optim_state_dict=states[1], options=settings
    )
    assert torch.equal(other(**BATCHES[0]).logits, model(**BATCHES[0]).logits)
    for one, two in zip(fresh.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(
            one["momentum_buffer"].full_tensor(), two["momentum_buffer"].full_tensor()
        )


def test_tied_embeddings_and_transposed_weights(mesh):
    """Conv1D stores (in, out), and wte is lm_head too: FSDP2 shards one parameter for both."""
    model = gpt2()
    expected = model(**BATCHES[0]).logits
    fully_shard(model, mesh=mesh)
    config = LoraConfig(r=2, target_modules=["c_attn", "wte"], init_lora_weights="pissa")
    adapted = get_peft_model(model, config, verify=BATCHES[0])
    torch.testing.assert_close(adapted.eval()(**BATCHES[0]).logits, expected)
    assert adapted.plan.targets[0].shared_with == ("lm_head.weight",)
