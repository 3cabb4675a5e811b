"""An adapter trained by several processes, on sharded weights, and on offloaded ones.

The processes are started once for a few cases, and once for the rest. Each runs its cases and
leaves what it found in a file.
"""

import copy
import functools
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from mixtures import mixture
from models import bert, gpt2, llama, token_batches
from processes import run_ranks
from products import chosen
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from lora_init import LoraConfig, get_peft_model

LLAMA = ["q_proj", "k_proj", "up_proj"]
CASES = {
    "edited": (llama, "pissa", LLAMA, {}),
    "kept tied": (gpt2, True, ["c_attn", "wte"], {}),
    "dora": (bert, "pissa", ["query", "dense"], {"use_dora": True, "bias": "lora_only"}),
    "in the forward pass": (lambda: llama().bfloat16(), "pissa", LLAMA, {}),
}
WORLD = 2
STEPS = 5
FULL = StateDictOptions(full_state_dict=True)
FEW = ("edited", "dora")
every_case = pytest.mark.parametrize("case", chosen(CASES, *FEW))


def tolerance_of(case):
    """Bfloat16 products of half a batch may round a value to its neighbor."""
    return 2e-3 if case == "in the forward pass" else 1e-6


def adapted(case, seed=0):
    make, method, targets, more = CASES[case]
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=method, target_modules=targets, **more)
    model = get_peft_model(make(), config, seed=seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # each process would draw other masks
    return model


def batches_for(case):
    """Rows of equal length, so that the whole batch's mean loss is the mean of its halves'."""
    batches = token_batches(count=STEPS, size=4, padded=False)
    make = CASES[case][0]
    return [
        b | {"labels": b["input_ids"][:, 0] % 3 if make is bert else b["input_ids"]}
        for b in batches
    ]


def rows_for(case):
    return [
        {name: value[row] for name, value in batch.items()}
        for batch in batches_for(case)
        for row in range(4)
    ]


def half(batch, rank):
    return {name: value.chunk(WORLD)[rank] for name, value in batch.items()}


def optimizer_of(model, name="sgd"):
    """At rates that let nothing jump: a 16-bit base rounds a last bit's difference up to a 2^-9."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(trainable, lr=0.02, momentum=0.9)
    return torch.optim.AdamW(trainable, lr=8e-4)


def optimize(model, batches, optimizer=None, backward=torch.Tensor.backward):
    optimizer = optimizer or optimizer_of(model)
    model.train()
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def products(model):
    """s B A of every layer."""
    return {
        name: layer.scaling * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())
        for name, layer in model.layers.items()
    }


def gap(first, second):
    """The largest relative difference of two models' products."""
    return max(float((first[n] - second[n]).norm() / second[n].norm()) for n in second)


def refusal(call):
    """The message of what is raised; None if nothing is."""
    try:
        call()
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return None


# -- what each process does ------------------------------------------------------------------------


def work(rank, folder, cases):
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process it is a fork of
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # looked at, not used
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    found = {}
    for case in cases:
        found[case] = {
            "start": adapted_state(case, rank),
            "ddp": replicated(case, rank, "sgd"),
            "adamw": replicated(case, rank, "adamw"),
            "fsdp": sharded(case, rank, folder),
        }
    trained = {"edited", "kept tied"}.intersection(cases)
    found["trainer"] = {case: under_trainer(case, folder, 2) for case in trained}
    if "edited" in cases:
        half_of = functools.partial(half, rank=rank)
        found["experts"] = expert_gradients(half_of, DistributedDataParallel)
        found["accelerate"] = accelerated("edited")
    torch.save(found, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def adapted_state(case, rank):
    torch.manual_seed(100 + rank)  # as processes that seed nothing
    return adapted(case).state_dict()


def expert_gradients(part, wrap=lambda model: model):
    """The gradients of experts, routers and a linear layer after one batch."""
    config = LoraConfig(
        r=2,
        init_lora_weights="pissa",
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
    )
    model = get_peft_model(mixture("qwen3_moe"), config, cache=False).train()
    wrapped = wrap(model)  # its hooks live as long as it does
    wrapped(**part(batches_for("edited")[0])).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def replicated(case, rank, name):
    model = adapted(case)
    wrapped = DistributedDataParallel(model)
    batches = [half(batch, rank) for batch in batches_for(case)]
    optimize(wrapped, batches, optimizer_of(wrapped, name))
    state = copy.deepcopy(wrapped.state_dict())
    # The inverse, into another wrapped model and another start.
    other = DistributedDataParallel(adapted(case, seed=1))
    other.load_state_dict(state)
    back = all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    return {"products": products(model), "state": state, "back": back}


def sharded(case, rank, folder):
    """FSDP, every layer of the model a unit: frozen and trained, 16 and 32 bits in one."""
    model = adapted(case)
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in model.modules():
        if type(module).__name__ in ("LlamaDecoderLayer", "GPT2Block", "BertLayer"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimize(model, [half(batch, rank) for batch in batches_for(case)])
    state = copy.deepcopy(get_model_state_dict(model, options=FULL))
    named = {type(value).__name__ for value in model.state_dict().values()}
    calls = {"merge_adapter": model.merge_adapter, "merge_and_unload": model.merge_and_unload}
    if any(layer.base_state == "edited" for layer in model.layers.values()):
        calls |= {"unload": model.unload, "init_report": model.init_report}
    model.save_pretrained(f"{folder}/{case}")
    messages = {name: refusal(call) for name, call in calls.items()}
    if calls.keys() & {"unload"}:  # it has other initial factors, and the base would have to follow
        other = adapted(case)
        for layer in other.layers.values():
            layer.initial_lora_A.mul_(2)
        calls = other.state_dict()
        messages["load_state_dict"] = refusal(
            lambda: set_model_state_dict(model, calls, options=FULL)
        )
    after = get_model_state_dict(model, options=FULL)
    unchanged = all(torch.equal(after[name], value) for name, value in state.items())
    doubled = {k: v * (2 if ".lora_" in k else 1) for k, v in state.items()}
    set_model_state_dict(model, copy.copy(doubled), options=FULL)
    loaded = get_model_state_dict(model, options=FULL)
    optimize(model, [half(batches_for(case)[0], rank)])  # and on it goes
    return {
        "state": state,
        "types": named,
        "messages": messages,
        "unchanged": unchanged,
        "loaded": all(torch.equal(loaded[name], value) for name, value in doubled.items()),
    }


def accelerated(case):
    """Whole batches go in; Accelerate splits them."""
    one = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    model = adapted(case)
    loader = torch.utils.data.DataLoader(rows_for(case), batch_size=4)
    wrapped, optimizer, loader = one.prepare(model, optimizer_of(model), loader)
    optimize(wrapped, loader, optimizer, one.backward)
    return {
        "processes": one.num_processes,
        "products": products(one.unwrap_model(wrapped)),
        "keys": list(one.get_state_dict(wrapped)),
    }


def under_trainer(case, folder, batch_size):
    model = adapted(case)
    arguments = TrainingArguments(
        output_dir=f"{folder}/trainer", max_steps=STEPS, per_device_train_batch_size=batch_size,
        use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1,
        dataloader_pin_memory=False, lr_scheduler_type="constant", learning_rate=0.02, optim="sgd",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows_for(case))
    trainer.train()
    wrapped = isinstance(trainer.model_wrapped, DistributedDataParallel)
    return {"products": products(model), "wrapped": wrapped}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return found_by(FEW, tmp_path_factory)


@pytest.fixture(scope="module")
def rest(tmp_path_factory):
    return found_by(CASES.keys() - FEW, tmp_path_factory)


def found_by(cases, tmp_path_factory):
    """What the two processes found, in order of their rank."""
    folder = tmp_path_factory.mktemp("processes")
    run_ranks(functools.partial(work, cases=sorted(cases)), folder, WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture
def found(request, case):
    return request.getfixturevalue("few" if case in FEW else "rest")


# -- what it must be -------------------------------------------------------------------------------


UNPICKLED = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
print(type(saved["model"]).__name__, torch.equal(saved["model"](saved["x"]), saved["y"]))
"""


def test_a_pickled_model_in_a_fresh_process(tmp_path):
    """One that has made no model yet: the class is found by the base model's."""
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config).eval()
    x = torch.randn(3, 8)
    torch.save({"model": model, "x": x, "y": model(x)}, tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", UNPICKLED, tmp_path / "model.pt"], capture_output=True, text=True
    )
    assert done.stdout.split() == ["LoraModel[Sequential]", "True"], done.stderr


@every_case
def test_every_process_starts_the_same(found, case):
    expected = adapted(case).state_dict()
    for one in found:
        assert all(torch.equal(one[case]["start"][name], v) for name, v in expected.items())


@every_case
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_processes_are_one(found, case, optimizer):
    model = adapted(case)
    start = products(model)
    optimize(model, batches_for(case), optimizer_of(model, optimizer))
    expected = products(model)
    ways = [one[case]["ddp" if optimizer == "sgd" else "adamw"] for one in found]
    assert gap(start, expected) > 1e-3
    for way in ways:
        assert gap(way["products"], expected) <= tolerance_of(case)
        assert way["back"]
        assert list(way["state"]) == [f"module.{name}" for name in model.state_dict()]
    assert all(torch.equal(ways[0]["state"][k], v) for k, v in ways[1]["state"].items())
    # One process loads what several have trained.
    fresh = adapted(case)
    fresh.load_state_dict({k.removeprefix("module."): v for k, v in ways[0]["state"].items()})
    assert gap(products(fresh), ways[0]["products"]) == 0.0


def test_gradients_of_experts_are_those_of_one_process(few):
    expected = expert_gradients(lambda batch: batch)
    assert {name.split(".")[-3] for name in expected} >= {"self_attn", "experts", "mlp"}
    for one in few:
        assert one["experts"].keys() == expected.keys()
        assert gap(one["experts"], expected) <= 1e-5


def test_accelerate_with_two_processes(few):
    model = adapted("edited")
    optimize(model, batches_for("edited"))
    for one in few:
        assert one["accelerate"]["processes"] == WORLD
        assert gap(one["accelerate"]["products"], products(model)) <= 1e-6
        assert one["accelerate"]["keys"] == list(model.state_dict())


# Trainer divides the tokens' losses by their number over all processes, in float32. The kept base's
# product is nothing but what was learned, so that it shows the gradients' rounding undiluted.
@pytest.mark.parametrize(
    ("case", "tolerance"),
    [("edited", 1e-6), pytest.param("kept tied", 5e-6, marks=pytest.mark.exhaustive)],
)
def test_trainer_with_two_processes(found, case, tolerance, tmp_path):
    expected = under_trainer(case, tmp_path, 4)
    assert not expected["wrapped"]
    for one in found:
        assert one["trainer"][case]["wrapped"]
        assert gap(one["trainer"][case]["products"], expected["products"]) <= tolerance


@every_case
def test_fully_sharded(found, case):
    model = adapted(case)
    optimize(model, batches_for(case))
    for one in found:
        fsdp = one[case]["fsdp"]
        assert "DTensor" in fsdp["types"]
        assert fsdp["loaded"]
        assert fsdp["unchanged"]
        for name, message in fsdp["messages"].items():
            assert message is not None, name
            assert message.startswith("RuntimeError: ")
            assert name in message
            assert "sharded, a DTensor. Gather the adapter" in message
        # Gathered, it is a plain adapter again.
        fresh = adapted(case)
        fresh.load_state_dict(fsdp["state"])
        assert gap(products(fresh), products(model)) <= tolerance_of(case)


# -- FullyShardedDataParallel, in one process ------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # of frozen and trained parameters in one unit, and of age
@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("case", ["edited", "dora"])
def test_fully_sharded_data_parallel(process_group, case, units, tmp_path):
    model, straight = adapted(case), adapted(case)
    wrap = {type(m) for m in model.modules() if type(m).__name__ in ("LlamaDecoderLayer",)}
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"),
        auto_wrap_policy=torch.distributed.fsdp.wrap.ModuleWrapPolicy(wrap) if units else None,
    )  # fmt: skip
    optimize(wrapped, batches_for(case))
    optimize(straight, batches_for(case))
    with FullyShardedDataParallel.summon_full_params(wrapped):
        assert gap(products(model), products(straight)) <= 1e-6
        state = copy.deepcopy(model.state_dict())
        model.save_pretrained(tmp_path / "adapter")
    assert list(state) == list(straight.state_dict())
    straight.load_state_dict(state)
    with pytest.raises(NotImplementedError, match="summon_full_params.*fully_shard"):
        wrapped.state_dict()


# -- offloading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_after_injection(where, tmp_path):
    model = adapted("edited").eval()
    batch = token_batches(count=1)[0]
    expected = model(**batch).logits
    if where == "cpu":
        cpu_offload(model.base_model, torch.device("cpu"))
    else:
        disk_offload(model.base_model, tmp_path, torch.device("cpu"))
    assert torch.equal(model(**batch).logits, expected)
    for call in (lambda: model.save_pretrained(tmp_path), model.merge_adapter, model.unload):
        with pytest.raises(RuntimeError, match="'model.layers.0.*' is offloaded, on the meta"):
            call()
    assert torch.equal(model(**batch).logits, expected)


def test_dora_on_an_offloaded_weight_is_refused():
    model = adapted("dora").eval()
    cpu_offload(model.base_model, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="DoRA reads the weight.*offloaded.*without use_dora"):
        model(**token_batches(count=1)[0])
