"""`LoraInitCallback` in a Trainer that shards by FSDP2: two ranks, compared with one process."""

import warnings
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from peft_training import logits, peft_model, trainer_of
from processes import run_ranks
from sharded import WORLD, findings, gap, join, leave
from substitutes import random_llama
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM

from lora_init import save_peft_model
from lora_init.integrations.transformers import LoraInitCallback
from lora_init.weights.sharded import is_dtensor, whole

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = ("pissa", "eva")
STATE_DICTS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
INITIAL = tuple(f".base_layer.initial_factors.initial_{letter}" for letter in "AB")
"""The names of A0 and B0, which a subtracting method has left in a base module."""
UNITS = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


class Watched(LoraInitCallback):
    """The callback, with what a resumed training must have again.

    Attributes:
        states: the factors, A0 and B0, and the optimizer's moments, at the start and by step.
    """

    def __init__(self, method):
        super().__init__(method, batches=4, seed=5)
        self.states = {}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        held = {id(each) for group in optimizer.param_groups for each in group["params"]}
        self.same = held == {id(each) for each in model.parameters() if each.requires_grad}
        self.states[state.global_step] = state_of(model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.states[state.global_step] = state_of(model, optimizer)


def state_of(model, optimizer):
    found = {name: whole(one) for name, one in model.named_parameters() if "lora_" in name}
    found |= {name: one for name, one in model.named_buffers() if name.endswith(INITIAL)}
    for name, one in model.named_parameters():
        for moment, value in optimizer.state.get(one, {}).items():
            found[f"{name} {moment}"] = whole(value)
    return {name: value.detach().clone() for name, value in found.items()}


def products(state):
    """s B A of each layer."""
    keys = [key for key in state if key.endswith("lora_A.default.weight")]
    return {key: 2 * state[key.replace("lora_A", "lora_B")] @ state[key] for key in keys}


def sharded_trainer(model, output, callback, state_dict="FULL_STATE_DICT", fsdp=None, **settings):
    fsdp = {"version": 2, "state_dict_type": state_dict, **UNITS, **(fsdp or {})}
    trainer = trainer_of(
        model, output, callback, ddp_backend="gloo", fsdp=True, fsdp_config=fsdp,
        max_grad_norm=0.0, **settings,
    )  # fmt: skip
    # Accelerate selects FSDP for accelerators only, but its code for FSDP2 runs on a CPU too.
    state = trainer.accelerator.state
    for shared in (state._shared_state, PartialState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True
    return trainer


# -- a training, also with accumulation ------------------------------------------------------------


def train(rank, folder, accumulation, optim):
    join(rank, folder)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process it is a fork of
    found = {}
    for method in METHODS:
        callback = Watched(method)
        trainer = sharded_trainer(
            peft_model(f"{folder}/llama"), f"{folder}/{method}", callback,
            gradient_accumulation_steps=accumulation, optim=optim,
        )  # fmt: skip
        trainer.train()
        trainer.save_model(f"{folder}/{method}/saved")
        assert any(map(is_dtensor, trainer.model.parameters()))
        found[method] = callback.states, callback.same
    leave(found, rank, folder)


# AdamW divides by the root of v, so it enlarges the rounding of gradients near zero.
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("accumulation", "optim", "tolerance"), [(1, "adamw_torch", 1e-3), (2, "sgd", 1e-5)]
)
def test_two_ranks_are_one_process(tmp_path, accumulation, optim, tolerance):
    """One process accumulates the batches that two ranks read in a step."""
    random_llama(tmp_path / "llama", 32)
    run_ranks(partial(train, accumulation=accumulation, optim=optim), tmp_path, WORLD)
    for method in METHODS:
        callback, model = Watched(method), peft_model(tmp_path / "llama")
        trainer_of(
            model, tmp_path, callback, gradient_accumulation_steps=WORLD * accumulation,
            optim=optim, max_grad_norm=0.0,
        ).train()  # fmt: skip
        first, last = callback.states[0], products(callback.states[4])
        assert gap(products(first), last) > 2e-3
        for states, same in (rank[method] for rank in findings(tmp_path)):
            assert same
            assert gap(states[0], first) <= 1e-6
            assert gap(products(states[4]), last) <= tolerance
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / method / "saved")
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)


# -- a resume --------------------------------------------------------------------------------------


class Run(NamedTuple):
    states: dict
    initialized: bool
    logits: torch.Tensor


def injected_model(folder):
    """A model that is not a PeftModel, after `add_adapter` of transformers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    return model


def biased_model(folder):
    return peft_model(folder, lora_bias=True)


def bfloat16_model(folder):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config, autocast_adapter_dtype=False)


def interrupt(rank, folder, state_dict, cases):
    join(rank, folder)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process it is a fork of
    settings = {"state_dict": state_dict, "save_strategy": "steps", "save_steps": 2}
    settings |= {"gradient_accumulation_steps": 2}
    found = {}
    for method, make in cases:
        output, runs = f"{folder}/{method} {make.__name__}", []
        for checkpoint in (None, f"{output}/checkpoint-2"):
            callback = Watched(method)
            trainer = sharded_trainer(make(f"{folder}/llama"), output, callback, **settings)
            trainer.train(resume_from_checkpoint=checkpoint)
            initialized = callback.report is not None
            runs.append(Run(callback.states, initialized, logits(trainer.model)))
        state = get_model_state_dict(trainer.model, options=FULL)
        if rank == 0:
            save_peft_model(trainer.model, f"{output}/saved", state_dict=dict(state))
        found[output] = method, runs
    leave(found, rank, folder)


def adapted_in_float64(folder, state):
    """The base with W + s (B A - B0 A0) for W."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for key in (key for key in state if key.endswith("lora_A.default.weight")):
        path = key.removesuffix(".lora_A.default.weight")
        change = state[f"{path}.lora_B.default.weight"].double() @ state[key].double()
        start = [value.double() for name, value in state.items()
                 if name.startswith(f"{path}.") and name.endswith(INITIAL)]  # fmt: skip
        if start:
            change -= start[1] @ start[0]
        base.get_submodule(path.removeprefix("base_model.model.")).weight.data += 2 * change
    return base


@pytest.mark.parametrize(
    "state_dict",
    [pytest.param("SHARDED_STATE_DICT", marks=pytest.mark.exhaustive), "FULL_STATE_DICT"],
)
def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path, state_dict):
    random_llama(tmp_path / "llama", 32)
    cases = [(method, peft_model) for method in METHODS]
    if state_dict == "SHARDED_STATE_DICT":
        cases.append(("pissa", injected_model))
    run_ranks(partial(interrupt, state_dict=state_dict, cases=cases), tmp_path, WORLD)
    found = [case for rank in findings(tmp_path) for case in rank.items()]
    assert len(found) == WORLD * len(cases)
    for output, (method, (straight, resumed)) in found:
        assert straight.initialized
        assert not resumed.initialized
        assert sorted(resumed.states) == [2, 3, 4]
        at_kill, end = straight.states[2], resumed.states[4]
        assert any("exp_avg" in name for name in at_kill)
        assert any(name.endswith(INITIAL) for name in at_kill) == (method == "pissa")
        assert gap(resumed.states[2], at_kill) <= 1e-6
        assert gap(end, straight.states[4]) <= 1e-6
        assert gap(products(at_kill), products(end)) > 1e-3
        expected = logits(adapted_in_float64(tmp_path / "llama", end)).float()
        torch.testing.assert_close(resumed.logits, expected, rtol=1e-5, atol=1e-5)
        assert_loaded(f"{output}/saved", tmp_path / "llama", end)
        if state_dict == "FULL_STATE_DICT":
            checkpoint = Path(output) / "checkpoint-2"
            assert_loaded(checkpoint, tmp_path / "llama", at_kill)
            assert (checkpoint / "pytorch_model_fsdp.bin").is_file() == (method == "eva")


def assert_loaded(adapter, base, state):
    """PEFT loads the adapter as W + s (B A - B0 A0)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(model, adapter)
    expected = logits(adapted_in_float64(base, state)).float()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("state_dict", STATE_DICTS)
def test_biases_and_16_bit_factors_are_resumed(tmp_path, state_dict):
    random_llama(tmp_path / "llama", 32)
    cases = [("pissa", biased_model), ("pissa", bfloat16_model)]
    run_ranks(partial(interrupt, state_dict=state_dict, cases=cases), tmp_path, WORLD)
    for _, (straight, resumed) in (case for rank in findings(tmp_path) for case in rank.values()):
        assert not resumed.initialized
        assert gap(resumed.states[2], straight.states[2]) <= 1e-6
        assert gap(resumed.states[4], straight.states[4]) <= 1e-6
        assert any(name.endswith(INITIAL) for name in resumed.states[2])


BEST, CHECKPOINTING = "load_best_model_at_end=True", "activation_checkpointing=True"


def refused(rank, folder):
    join(rank, folder)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process it is a fork of
    found = {}
    for method, state_dict, setting in product(METHODS, STATE_DICTS, (BEST, CHECKPOINTING)):
        callback = Watched(method)
        fsdp = {"activation_checkpointing": setting is CHECKPOINTING}
        model = peft_model(f"{folder}/llama")
        trainer = sharded_trainer(model, folder, callback, state_dict, fsdp, max_steps=1)
        trainer.args.load_best_model_at_end = setting is BEST
        try:
            trainer.train()
        except ValueError as error:
            assert callback.report is None
            found[method, state_dict, setting] = str(error)
    callback, settings = Watched("pissa"), {"max_steps": 1, "save_strategy": "epoch"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sharded_trainer(injected_model(f"{folder}/llama"), folder, callback, **settings).train()
    told = any("state_dict_type in fsdp_config" in str(one.message) for one in caught)
    leave((found, told), rank, folder)


@pytest.mark.exhaustive
def test_what_torch_or_peft_would_lose_is_refused(tmp_path):
    """torch cannot load the best model, or PEFT's files would be empty."""
    random_llama(tmp_path / "llama", 32)
    run_ranks(refused, tmp_path, WORLD)
    expected = {(*case, CHECKPOINTING) for case in product(METHODS, STATE_DICTS)}
    expected.add(("pissa", "FULL_STATE_DICT", BEST))
    for rank, (found, told) in enumerate(findings(tmp_path)):
        assert told == (rank == 0)  # about a checkpoint of a model without a PeftModel
        assert found.keys() == expected
        for (*_, setting), message in found.items():
            assert message.startswith(setting)
