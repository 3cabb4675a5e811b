"""An operation that is broken off leaves the model as it was before, or as it is afterwards."""

import contextlib
import copy
import functools
from itertools import product

import pytest
import torch
from interrupts import count_lines, interrupted_at
from measures import train
from models import Batches, data_of
from networks import Chain, chain_inputs
from products import thinned
from torch import nn

from lora_init import LoraConfig, LoraModel, get_peft_model, reinitialize


class Saving(Chain):
    """A chain that can save itself."""

    def save_pretrained(self, folder):
        raise AssertionError("an injected base must not be saved")


class Tied(nn.Module):
    """A chain whose `tall` shares its weight with a second module."""

    def __init__(self):
        super().__init__()
        self.chain = Chain()
        self.twin = nn.Linear(32, 56, bias=False)
        self.twin.weight = self.chain.tall.weight

    def forward(self, x):
        return torch.cat([self.chain(x), self.twin(x)], dim=-1)


STATES = {
    "edited": (Saving, "pissa", {}),
    "in_forward": (lambda: Chain(dtype=torch.bfloat16), "pissa", {}),
    "replaced": (Chain, "loftq", {}),
    "calibrated": (Chain, "corda", {}),
    "gradients": (Chain, "lora_ga", {}),
    "dora": (Chain, "olora", {"use_dora": True}),
    "biases": (Chain, "pissa", {"bias": "all", "lora_bias": True}),
    "whole module": (Chain, "pissa", {"modules_to_save": ["wide"]}),
    "tied": (Tied, "pissa", {}),
    "4-bit": (lambda: Chain("Linear4bit"), "pissa", {}),
    "4-bit replaced": (lambda: Chain("Linear4bit"), "pissa", {}),
}


def started(state, base=None, method=None, seed=0):
    make, own_method, settings = STATES[state]
    base = make() if base is None else base
    chain = getattr(base, "chain", base)
    inputs = chain_inputs(20, chain.square.in_features, chain.square.bias.dtype)
    names = ["square", "tall", *(["wide"] if "modules_to_save" not in settings else [])]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=names, init_lora_weights=method or own_method, **settings
    )
    spec, _ = config.initializer()
    return get_peft_model(
        base,
        config,
        calibration=data_of(spec, Batches([inputs])),
        keep_original=True,
        quantized_base="requantize" if state == "4-bit replaced" else "in_forward",
        seed=seed,
    )


@functools.cache
def trained(state, seed=0):
    return train(started(state, seed=seed))


class Subject:
    """A base model and, where it has one, its LoraModel."""

    def __init__(self, state, folder=None):
        self.state, self.folder, self.detached = state, folder, None
        self.model = copy.deepcopy(trained(state))
        self.base = self.model.get_base_model()


def plain(subject):
    subject.base, subject.model = STATES[subject.state][0](), None


def merged(subject):
    subject.model.merge_adapter()


def detached(subject):
    subject.detached = subject.model.detach_adapter()


def saved(subject):
    if not any(subject.folder.iterdir()):
        trained(subject.state).save_pretrained(subject.folder)
    plain(subject)


def start(subject):
    subject.model = started(subject.state, subject.base)


def load(subject):
    subject.model = LoraModel.from_pretrained(subject.base, subject.folder, keep_original=True)


def start_again(subject):
    model = subject.model
    method = "pissa" if STATES[subject.state][1] != "pissa" else "orthogonal"
    subject.model = reinitialize(
        model, LoraConfig(r=2, target_modules=["square"], init_lora_weights=method)
    )


def disable(subject):
    with subject.model.disable_adapter():
        pass


def load_state(subject):
    seed = 0 if "replaced" in subject.state else 1
    state = {key: value.clone() for key, value in trained(subject.state, seed).state_dict().items()}
    if seed == 0:
        state = {key: value * 2 if ".lora_" in key else value for key, value in state.items()}
    subject.model.load_state_dict(state)


def new_factors(subject):
    """Fixed beforehand: an operation that is complete may be run once more."""
    subject.moved = "chain.tall" if subject.state == "tied" else "tall"
    layer = subject.model.layers[subject.moved]
    subject.factors = layer.initial_lora_A * 0.5, layer.initial_lora_B


def move(subject):
    subject.model.move_initial_factors(subject.moved, *subject.factors)


OPERATIONS = {
    "get_peft_model": (plain, start),
    "from_pretrained": (saved, load),
    "reinitialize": (None, start_again),
    "unload": (None, lambda subject: subject.model.unload()),
    "delete_adapter": (None, lambda subject: subject.model.delete_adapter()),
    "attach_adapter": (detached, lambda subject: subject.model.attach_adapter(subject.detached)),
    "merge_adapter": (None, lambda subject: subject.model.merge_adapter()),
    "unmerge_adapter": (merged, lambda subject: subject.model.unmerge_adapter()),
    "unload merged": (merged, lambda subject: subject.model.unload()),
    "merge_and_unload": (None, lambda subject: subject.model.merge_and_unload()),
    "disable_adapter": (None, disable),
    "load_state_dict": (None, load_state),
    "move_initial_factors": (new_factors, move),
}


def description(subject):
    base = subject.base
    seen = {
        "state": {key: value.detach().clone() for key, value in base.state_dict().items()},
        "types": {name: type(m) for name, m in base.named_modules(remove_duplicate=False)},
        "flags": {name: p.requires_grad for name, p in base.named_parameters()},
        "training": {name: module.training for name, module in base.named_modules()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()),
        "habits": [vars(m).get("support_avx512bf16_for_cpu") for m in base.modules()],
        "own methods": [
            {name for name in vars(m) if callable(getattr(type(m), name, None))}
            for m in base.modules()
        ],
        "tied": getattr(base, "twin", None) is not None
        and base.twin.weight is base.chain.tall.weight,
    }
    chain = getattr(base, "chain", base)
    with torch.no_grad():
        seen["outputs"] = {
            "x": base(chain_inputs(5, chain.square.in_features, chain.square.bias.dtype))
        }
    return seen


def difference(seen, expected, tolerance=2e-6):
    """What differs between two descriptions; None where they are equal up to rounding."""
    for part, value in expected.items():
        if part not in ("state", "outputs"):
            if seen[part] != value:
                return part
            continue
        if seen[part].keys() != value.keys():
            return f"keys of {part}"
        for key, tensor in value.items():
            slack = tolerance * float(tensor.abs().float().max())
            slack = slack if tensor.is_floating_point() else 0.0
            if not torch.allclose(seen[part][key].double(), tensor.double(), rtol=0, atol=slack):
                return f"{part} {key}"
    return None


def refuses_half_merged(model):
    """Whether the model is half merged, which is the one state in between, and says so."""
    try:
        model.unload()
    except RuntimeError as refusal:
        return "merge_and_unload failed after" in str(refusal)
    return False


def check_interrupts(state, operation, folder, points, error):
    prepare, run = OPERATIONS[operation]

    def make():
        subject = Subject(state, folder)
        if prepare is not None:
            prepare(subject)
        return subject

    with torch.random.fork_rng(devices=[]), contextlib.suppress(UserWarning):
        subject = make()
        before = description(subject)
        total = count_lines(functools.partial(run, subject))
        after = description(subject)
        offset = sum(map(ord, state + operation)) % max(1, total // points)
        wrong = []
        for number in range(1 + offset, total + 1, max(1, total // points)):
            subject = make()
            with interrupted_at(number, error) as lines:
                run(subject)
            seen = description(subject)
            reason = difference(seen, before)
            # A new model that was not returned must be undone; other operations may be complete.
            others = reason is not None and operation not in ("get_peft_model", "from_pretrained")
            if others and (difference(seen, after) is None or refuses_half_merged(subject.model)):
                reason = None
            if reason is None:
                try:
                    run(subject)
                except RuntimeError as refusal:
                    reason = None if "was unloaded" in str(refusal) else f"then: {refusal}"
                else:
                    # An edit that was undone has other last bits, which a method may amplify.
                    reason = difference(description(subject), after, 1e-3)
                    reason = reason and f"then: {reason}"
            if reason is not None:
                wrong.append(f"{lines.where} (line {number} of {total}): {reason}")
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)


STORED = ("in_forward", "replaced", "4-bit", "4-bit replaced")


def kind_of_base(state):
    """What an operation does to the base: most states edit a float32 weight."""
    return state if state in STORED else "edited"


warns = pytest.mark.filterwarnings("ignore:.*shared its weight:UserWarning", "ignore:merged into")


@warns
@pytest.mark.parametrize(
    ("state", "operation"),
    thinned(
        list(product(STATES, OPERATIONS)),
        lambda state, operation: state,
        lambda state, operation: (kind_of_base(state), operation),
    ),
)
def test_an_interrupt_leaves_the_state_before_or_after(state, operation, tmp_path):
    check_interrupts(state, operation, tmp_path, 3, KeyboardInterrupt)


@pytest.mark.exhaustive
@warns
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("state", STATES)
def test_an_error_at_any_line_leaves_the_state_before_or_after(state, operation, error, tmp_path):
    check_interrupts(state, operation, tmp_path, 60, error)
