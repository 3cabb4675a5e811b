"""An adapter on a base under tensor parallelism, with two ranks, compared with one process."""

from functools import partial

import pytest
import torch
from models import llama, t5, t5_batches, token_batches
from processes import run_ranks
from products import chosen
from sharded import WORLD, batches, config, findings, gap, join, leave, logits, products, train
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaForCausalLM

from lora_init import LoraConfig, LoraModel, calibrate, get_peft_model
from lora_init.weights.sharded import whole

BY_OUTPUTS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
BY_INPUTS = ["o_proj", "down_proj"]
CASES = {
    "pissa": ("torch", "pissa", torch.float32),
    "transformers": ("transformers", "pissa", torch.float32),
    "kaiming": ("torch", True, torch.float32),
    "lora_xs": ("torch", "lora_xs", torch.float32),
    "double": ("torch", "pissa", torch.float64),
}
FEW = {"transformers"}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # only on rank 0
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def parallel_llama(by, dtype, folder, mesh=None):
    if by == "transformers":
        return LlamaForCausalLM.from_pretrained(f"{folder}/base", tp_plan="auto").eval()
    model = llama().to(dtype)
    mesh = init_device_mesh("cpu", (WORLD,)) if mesh is None else mesh
    styles = dict.fromkeys(BY_OUTPUTS, ColwiseParallel) | dict.fromkeys(BY_INPUTS, RowwiseParallel)
    for name, module in model.named_modules():
        if (style := styles.get(name.rpartition(".")[2])) is not None:
            parallelize_module(module, mesh, style())
    return model


def adapted(base, start, dtype, seed=0):
    return get_peft_model(base, config(init_lora_weights=start), adapter_dtype=dtype, seed=seed)


def gradients(model):
    model(**batches()[0]).loss.backward()
    found = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def work(rank, folder, cases):
    join(rank, folder)
    leave({case: in_parallel(case, folder) for case in cases}, rank, folder)


def in_parallel(case, folder):
    by, start, dtype = CASES[case]
    data = batches()
    base = parallel_llama(by, dtype, folder)
    before = logits(base, data)
    model = adapted(base, start, dtype)
    found = {
        "start": products(model),
        "step 0": gap({0: logits(model, data)}, {0: before}),
        "report": [row["error"] for row in model.init_report().to_dict()["layers"]],
        "gradients": gradients(model),
        "trained": products(train(model, data)),
        "logits": logits(model, data),
    }
    with model.disable_adapter():
        found["disabled"] = gap({0: logits(model, data)}, {0: before})
    model.save_pretrained(f"{folder}/{case}")
    found["state"] = get_model_state_dict(model, options=FULL)
    distributed.barrier()
    other = adapted(parallel_llama(by, dtype, folder), start, dtype, seed=1)
    set_model_state_dict(other, dict(found["state"]), options=FROM_RANK_0)
    found["loaded"] = gap({0: logits(other, data)}, {0: found["logits"]})
    other = LoraModel.from_pretrained(
        parallel_llama(by, dtype, folder), f"{folder}/{case}", adapter_dtype=dtype
    )
    found["from file"] = gap({0: logits(other.eval(), data)}, {0: found["logits"]})
    return found


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return ran(FEW, tmp_path_factory)


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return ran(CASES.keys() - FEW, tmp_path_factory)


def ran(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    llama().save_pretrained(folder / "base")
    run_ranks(partial(work, cases=sorted(cases)), folder, WORLD)
    return folder, findings(folder)


@pytest.mark.parametrize("case", chosen(CASES, *FEW))
def test_two_ranks_are_one_process(request, case):
    folder, found = request.getfixturevalue("few" if case in FEW else "rest")
    _, start, dtype = CASES[case]
    model = adapted(llama().to(dtype), start, dtype)
    first, by_layer = products(model), gradients(model)
    errors = [row["error"] for row in model.init_report().to_dict()["layers"]]
    trained = products(train(model, batches()))
    expected = logits(model, batches())
    # Two layers of sums in another order: float64 shows that nothing else differs.
    tolerance = 1e-6 if dtype == torch.float64 else 5e-6
    for one in (rank[case] for rank in found):
        assert gap(one["start"], first) <= 1e-6
        assert gap(one["gradients"], by_layer) <= tolerance
        assert gap(one["trained"], trained) <= tolerance
        torch.testing.assert_close(one["logits"], expected, atol=1e-5, rtol=1e-5)
        for found_error, error in zip(one["report"], errors, strict=True):
            assert found_error == (error if error is None else pytest.approx(error, rel=1e-5))
        assert one["disabled"] == 0
        assert start == "lora_xs" or one["step 0"] == 0  # lora_xs changes the output
        for way in ("loaded", "from file"):
            assert one[way] <= 1e-6, way
    assert found[0][case]["state"].keys() == model.state_dict().keys()
    fresh = LoraModel.from_pretrained(llama().to(dtype), folder / case, adapter_dtype=dtype)
    torch.testing.assert_close(logits(fresh.eval(), batches()), expected, atol=1e-4, rtol=1e-4)


# -- calibration -----------------------------------------------------------------------------------

FROM_INPUTS = ["eva", "corda"]
CROSS_ATTENTION = [f"decoder.block.1.layer.1.EncDecAttention.{one}" for one in "kv"]


def padded():
    """Batches with masks, which the parts of inputs have too."""
    return token_batches(count=3, size=4, padded=True)


def summary(found):
    """The moments of each layer's inputs, and the counts of tokens and batches."""
    moments = {
        name: (layer.inputs.mean, layer.inputs.second_moment, layer.inputs.tokens)
        for name, layer in found.layers.items()
    }
    return moments, (found.tokens, found.batches)


def assert_same_moments(found, expected):
    (own_mean, own_moment, own_tokens), (mean, moment, tokens) = found, expected
    assert own_tokens == tokens
    assert (own_mean - mean).abs().max() <= 1e-6 * moment.diagonal().mean().sqrt()
    assert gap({0: own_moment}, {0: moment}) <= 1e-6


def calibrated(base):
    """What the inputs of each layer are, and the factors that follow from them."""
    found = {}
    for method in FROM_INPUTS:
        settings = config(init_lora_weights=method)
        found[method] = summary(calibrate(base, settings, padded()))
    model = get_peft_model(base, config(init_lora_weights="corda"), calibration=padded())
    found["start"] = products(model)
    found["reported"] = model.init_report().calibration_tokens
    return found


def of_cross_attention(model):
    """The moments of what a decoder reads of its encoder, whose mask differs from its own."""
    data = [
        batch | {"decoder_attention_mask": torch.ones_like(batch["decoder_input_ids"])}
        for batch in t5_batches(padded=True)
    ]
    targets = LoraConfig(r=2, target_modules=CROSS_ATTENTION, init_lora_weights="corda")
    return calibrate(model, targets, data)


def calibrate_in_parallel(rank, folder):
    join(rank, folder)
    found = {}
    for by in ("torch", "transformers"):
        found[by] = calibrated(parallel_llama(by, torch.float32, folder))
        base = parallel_llama(by, torch.float32, folder)
        eva = get_peft_model(base, config(init_lora_weights="eva"), calibration=padded())
        found[by]["A"] = {name: whole(layer.lora_A) for name, layer in eva.layers.items()}
        base = parallel_llama(by, torch.float32, folder)
        for start in (
            partial(calibrate, batches=batches()),
            partial(get_peft_model, calibration=batches()),
        ):
            with pytest.raises(ValueError, match="needs gradients, and .* by tensor parallelism"):
                start(base, config(init_lora_weights="lora_ga"))
    encoder_decoder = t5()
    mesh = init_device_mesh("cpu", (WORLD,))
    for name in CROSS_ATTENTION:
        module = encoder_decoder.get_submodule(name)
        parallelize_module(module, mesh, ColwiseParallel(output_layouts=Replicate()))
    leave((found, summary(of_cross_attention(encoder_decoder))), rank, folder)


def test_statistics_of_two_ranks_are_those_of_one_process(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    run_ranks(calibrate_in_parallel, tmp_path, WORLD)
    expected = calibrated(llama())
    eva = get_peft_model(llama(), config(init_lora_weights="eva"), calibration=padded())
    directions = {name: layer.lora_A for name, layer in eva.layers.items()}
    crossing = of_cross_attention(t5())
    for rank, (moments, counts) in findings(tmp_path):
        assert counts == (crossing.tokens, crossing.batches)
        for name, wanted in summary(crossing)[0].items():
            assert_same_moments(moments[name], wanted)
        for found in rank.values():
            for method in FROM_INPUTS:
                (own, counts), (layers, expected_counts) = found[method], expected[method]
                assert counts == expected_counts
                assert own.keys() == layers.keys()
                for name, wanted in layers.items():
                    assert_same_moments(own[name], wanted)
            assert found["reported"] == expected["reported"]
            assert gap(found["start"], expected["start"]) <= 1e-6
            assert found["A"].keys() == directions.keys()
            for name, wanted in directions.items():
                own = found["A"][name]
                assert gap({0: own.mT @ own}, {0: wanted.mT @ wanted}) <= 1e-6


def calibrate_on_pairs(rank, folder):
    """Two pairs of ranks hold the model, and each pair has other batches."""
    join(rank, folder, world=2 * WORLD)
    mesh = init_device_mesh("cpu", (2, WORLD), mesh_dim_names=("data", "model"))
    base = parallel_llama("torch", torch.float32, folder, mesh["model"])
    own = padded()[mesh["data"].get_local_rank() :: 2]
    found = calibrate(base, config(init_lora_weights="corda"), own)
    leave(summary(found), rank, folder)


def test_pairs_of_ranks_share_the_batches_out(tmp_path):
    run_ranks(calibrate_on_pairs, tmp_path, 2 * WORLD)
    layers, counts = summary(calibrate(llama(), config(init_lora_weights="corda"), padded()))
    for own_layers, own_counts in findings(tmp_path, 2 * WORLD):
        assert own_counts == counts
        assert own_layers.keys() == layers.keys()
        for name, expected in layers.items():
            assert_same_moments(own_layers[name], expected)
