"""After Ctrl-C or a MemoryError at any line, a PEFT model is as before or after the call."""

import copy
import functools
from itertools import product

import peft
import pytest
import torch
from interrupts import sample_interrupts
from measures import train
from models import Batches
from networks import Case
from packing import kept_plain
from products import every_value

from lora_init import initialize_peft_model, load_peft_checkpoint, restore_peft_model
from lora_init.peft_models.start import records

pytestmark = pytest.mark.sampled(3)

CASES = {
    "float32": Case(),
    "bfloat16": Case("Linear", torch.bfloat16),
    "nf4": Case("Linear4bit"),
    "int8": Case("Linear8bitLt"),
}
STARTS = [
    ("kaiming", "float32"), ("pissa", "float32"), ("pissa", "bfloat16"), ("pissa", "nf4"),
    ("requantized pissa", "nf4"), ("requantized pissa", "int8"), ("loftq", "float32"),
    ("eva", "float32"), ("lora_ga", "float32"),
]  # fmt: skip


def wrapped(kind, bias="none"):
    return copy.deepcopy(built(kind, bias))


@functools.cache
def built(kind, bias):
    case = CASES[kind]
    base = kept_plain(case.build()) if case.packed else case.build()
    if case.packed:
        setattr(base, f"is_loaded_in_{case.kind[6]}bit", True)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(case.shapes), bias=bias)
    return peft.get_peft_model(base, config).train()


def start(model, method, kind):
    settings = {}
    if method.startswith("requantized "):
        method, settings = method.split()[1], {"quantized_base": "requantize"}
    if method in ("eva", "lora_ga"):
        settings["calibration"] = Batches(CASES[kind].calibration()[:1])
    initialize_peft_model(model, method, cache=False, **settings)
    return model


def state(model):
    """Everything that an operation may change; the tensors are separate."""
    tuner = model.base_model
    tensors = dict(tuner.model.named_parameters()) | dict(tuner.model.named_buffers())
    modules = dict(tuner.model.named_modules())
    figures = {
        "tensors": {name: (t.shape, t.dtype, t.requires_grad) for name, t in tensors.items()},
        "gradients": [name for name, t in tensors.items() if t.grad is not None],
        "modules": {name: type(module).__name__ for name, module in modules.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {name: [getattr(hook, "__name__", type(hook).__name__)
                         for hook in module._forward_hooks.values()]
                  for name, module in modules.items()},
        "pre-hooks": sum(len(module._forward_pre_hooks) for module in modules.values()),
        "ranks": {name: (dict(module.r), dict(module.scaling), dict(module.lora_alpha))
                  for name, module in modules.items() if hasattr(module, "scaling")
                  and hasattr(module, "r")},
        "records": sorted(records(model)),
        "methods": [record.plan.initializer.name for record in records(model).values()],
        "config": {name: str(config) for name, config in model.peft_config.items()},
        "guards": [sorted(name for name in vars(owner) if hasattr(type(owner), name))
                   for owner in (model, tuner, tuner.model)],
        "state dict hooks": len(model._state_dict_hooks) + len(model._load_state_dict_pre_hooks),
    }  # fmt: skip
    return figures, {name: tensor.detach().float().clone() for name, tensor in tensors.items()}


def difference(present, wanted):
    for part, value in wanted[0].items():
        if present[0][part] != value:
            return part
    for name, tensor in wanted[1].items():
        gap = (present[1][name] - tensor).abs().max()
        if not gap <= 2e-6 * tensor.abs().max():
            return f"{name} by {gap:.1e}"
    return None


def assert_whole(make, operation, error=KeyboardInterrupt, points=8, again=True):
    """The state is the one before or after each interrupt; a second call completes."""
    before, model = state(make()), make()
    operation(model)
    after = state(model)

    def check(model):
        present = state(model)
        reasons = [difference(present, before), difference(present, after)]
        return None if None in reasons else f"{reasons[0]} from before, {reasons[1]} from after"

    def finish(model):
        if difference(state(model), after) is not None:
            operation(model)
            reason = difference(state(model), after)
            assert reason is None, f"the second call differs in {reason}"

    sample_interrupts(make, operation, check, points, error, finish if again else None)


@pytest.mark.parametrize(
    ("method", "kind", "error"),
    # Both errors must have the same effect.
    every_value(((*one, error) for one in STARTS for error in (KeyboardInterrupt, MemoryError)), 3),
)
def test_initializing(method, kind, error):
    assert_whole(lambda: wrapped(kind), lambda model: start(model, method, kind), error)


@pytest.mark.parametrize(
    ("first", "second"),
    every_value([("pissa", "eva"), ("loftq", "kaiming"), ("pissa", "olora"), ("eva", "pissa")], 1),
)
def test_initializing_again(first, second):
    assert_whole(
        lambda: start(wrapped("float32"), first, "float32"),
        lambda model: start(model, second, "float32"),
    )


@pytest.mark.parametrize(("method", "kind"), every_value(STARTS, 2))
def test_restoring(method, kind):
    made = train(start(wrapped(kind), method, kind))
    assert_whole(lambda: copy.deepcopy(made), restore_peft_model)


@pytest.mark.parametrize(
    ("call", "method"),
    every_value(product(["unload", "delete_adapter"], ["kaiming", "pissa", "loftq"]), 2),
)
def test_removing(call, method):
    made = train(start(wrapped("float32"), method, "float32"))
    names = {"unload": (), "delete_adapter": ("default",)}[call]
    assert_whole(
        lambda: copy.deepcopy(made), lambda model: getattr(model, call)(*names), again=False
    )


@pytest.mark.parametrize(
    ("method", "before"), every_value(product(["kaiming", "pissa", "loftq"], [None, "olora"]), 2)
)
def test_loading_a_checkpoint(method, before, tmp_path):
    train(start(wrapped("float32", bias="all"), method, "float32")).save_pretrained(tmp_path)

    def make():
        model = wrapped("float32", bias="all")
        return model if before is None else start(model, before, "float32")

    assert_whole(make, lambda model: load_peft_checkpoint(model, tmp_path))


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_loading_an_adapter_of_the_same_start(method, tmp_path):
    made = start(wrapped("float32", bias="all"), method, "float32")
    train(made).save_pretrained(tmp_path)
    train(made, seed=6)
    assert_whole(
        lambda: copy.deepcopy(made),
        lambda model: model.load_adapter(tmp_path, "default", is_trainable=True),
    )
