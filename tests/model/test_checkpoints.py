"""Training checkpoints: a LoraModel's state dict is its adapter, and loading one is the inverse."""

import copy
from itertools import product

import pytest
import torch
from measures import assert_gap, assert_unchanged, logits, snapshot, train
from methods import METHODS, REPLACING, SPECS, across
from models import bert, data_of, llama, token_batches
from networks import Chain, chain_calibration, chain_inputs
from products import every_value, thinned
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lora_init import LoraConfig, LoraModel, get_peft_model, reinitialize

pytestmark = pytest.mark.sampled(4)

VARIANTS = {
    "plain": {},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "biases": {"bias": "all"},
}
every_start = pytest.mark.parametrize(("method", "variant"), across(METHODS, list(VARIANTS)))


def start(method="pissa", *, base=None, seed=0, calibration=None, dtype=torch.float32, **settings):
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=method, **settings
    )
    spec, _ = config.initializer()
    data = data_of(spec, calibration or chain_calibration(dtype))
    base = Chain(dtype=dtype) if base is None else base
    return get_peft_model(base, config, calibration=data, seed=seed)


def copied(state):
    return {key: value.clone() for key, value in state.items()}


# -- what it holds ---------------------------------------------------------------------------------


@every_start
def test_it_holds_the_adapter_and_loading_is_the_inverse(method, variant):
    settings = VARIANTS[variant]
    model = train(start(method, **settings))
    state = copied(model.state_dict())
    resumed = start(method, **settings)
    result = resumed.load_state_dict(state)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(resumed(chain_inputs(20)), model(chain_inputs(20)))
    after = resumed.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    state.pop("_extra_state")  # the start: see the section below
    core = ["lora_core"] if SPECS[method].has_core else []
    further = {"use_dora": "lora_magnitude_vector", "lora_bias": "lora_bias", "bias": "bias"}
    assert {key.rpartition(".")[2] for key in state} == {
        "lora_A", "lora_B", "initial_lora_A", "initial_lora_B", *core,
        *(further[key] for key in settings),
    }  # fmt: skip
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(torch.equal(tensors[key], value) for key, value in state.items())
    assert {name for name, value in model.named_parameters() if value.requires_grad} <= set(state)


def test_modules_trained_whole_are_in_it():
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", bias="all")
    model = train(get_peft_model(bert(), config))
    state = copied(model.state_dict())
    assert "base_model.classifier.trained_module.weight" in state
    assert not any("original_module" in key for key in state)
    assert "base_model.bert.encoder.layer.0.attention.self.query.base_layer.bias" in state
    resumed = get_peft_model(bert(), config)
    resumed.load_state_dict(state)
    assert_gap(logits(resumed, token_batches()), logits(model, token_batches()), 0.0)


@pytest.mark.parametrize("target", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_tied_model(target):
    """Neither name of the tied weight is in it, whichever of the two is adapted."""
    config = LoraConfig(r=4, target_modules=target, init_lora_weights="pissa")
    base = llama(tied=True)
    model = train(get_peft_model(copy.deepcopy(base), config))
    state = copied(model.state_dict())
    assert len(state) == 4 * len(target) + 1
    assert not any(key.endswith(("lm_head.weight", "embed_tokens.weight")) for key in state)
    resumed = get_peft_model(copy.deepcopy(base), config)
    resumed.load_state_dict(state)
    assert_gap(logits(resumed, token_batches()), logits(model, token_batches()), 0.0)
    restored = resumed.unload()
    assert restored.lm_head.weight is restored.model.embed_tokens.weight


def test_an_unloaded_model_has_a_plain_state_dict_again():
    base = Chain()
    expected = base.state_dict().keys()
    model = start(base=base)
    model.unload()
    assert [key.removeprefix("base_model.") for key in model.state_dict()] == list(expected)
    assert base.state_dict().keys() == expected


# -- inside another module -------------------------------------------------------------------------


class Scorer(nn.Module):
    """A LoraModel between two other modules."""

    def __init__(self, model):
        super().__init__()
        self.before = nn.Linear(32, 32)
        self.model = model
        self.after = nn.Linear(24, 1)

    def forward(self, x):
        return self.after(self.model(self.before(x)))


@pytest.mark.parametrize("seed", [0, 1])
def test_inside_another_module(seed):
    scorer = train(Scorer(start("orthogonal")))
    state = copied(scorer.state_dict())
    mine = {key for key in state if key.startswith("model.")}
    assert {key.removeprefix("model.") for key in mine} == set(scorer.model.state_dict())
    assert len(state) == len(mine) + 4
    resumed = Scorer(start("orthogonal", seed=seed))
    result = resumed.load_state_dict(state)
    assert result.missing_keys == []
    x = chain_inputs(20)
    assert torch.equal(resumed(x), scorer(x))


def test_the_owners_missing_tensors_are_still_reported():
    scorer = Scorer(start())
    state = copied(scorer.state_dict())
    del state["before.weight"], state["after.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"before.weight", "after.bias"'):
        scorer.load_state_dict(state)
    result = scorer.load_state_dict(state, strict=False)
    assert result.missing_keys == ["before.weight", "after.bias"]


# -- from another start ----------------------------------------------------------------------------


def other_start(method, **settings):
    """The same method from another seed, and other calibration data where it needs some."""
    data = [chain_inputs(40, dtype=settings.get("dtype", torch.float32), seed=77)]
    return start(method, seed=9, calibration=data, **settings)


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["edited", "in_forward"])
@pytest.mark.parametrize("method", ["corda", "orthogonal", "pissa_niter_1"])
def test_the_base_follows_a_checkpoint_from_another_start(method, dtype, variant):
    model = train(other_start(method, dtype=dtype, **variant), size=0.2)  # seen in 16 bits, too
    state = copied(model.state_dict())
    resumed = start(method, dtype=dtype, **variant)
    x = chain_inputs(20, dtype=dtype)
    started = resumed(x)
    resumed.load_state_dict(state)
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert_gap(resumed(x), model(x), tolerance)
    with pytest.raises(AssertionError):
        assert_gap(started, model(x), tolerance)
    with resumed.disable_adapter():
        assert_gap(resumed(x), Chain(dtype=dtype)(x), tolerance)
    expected = Chain(dtype=dtype).state_dict()
    for key, value in resumed.unload().state_dict().items():
        assert (value - expected[key]).abs().max() <= 1e-6 * expected[key].abs().max()


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_moved_base_is_saved_and_merged_right(use_dora, tmp_path):
    model = train(other_start("corda", use_dora=use_dora))
    resumed = start("corda", use_dora=use_dora)
    resumed.load_state_dict(copied(model.state_dict()))
    x = chain_inputs(20)
    resumed.save_pretrained(tmp_path)
    assert_gap(LoraModel.from_pretrained(Chain(), tmp_path)(x), model(x), 1e-5)
    assert_gap(resumed.merge_and_unload()(x), model(x), 1e-5)


def test_an_edit_that_grows_too_large_moves_to_the_forward_pass():
    model = start()
    assert {layer.base_state for layer in model.layers.values()} == {"edited"}
    state = copied(model.state_dict())
    for key in state:
        if "square" in key and key.endswith("lora_A"):
            state[key] *= 100  # A and A0 alike: the output is preserved
    model.load_state_dict(state)
    assert model.layers["square"].base_state == "in_forward"
    x = chain_inputs(20)
    assert_gap(model(x), Chain()(x), 1e-5 * 100)
    restored = model.unload()
    assert (restored.square.weight - Chain().square.weight).abs().max() <= 1e-6


# -- of a model in other wrappers ------------------------------------------------------------------


def compiled_base(model):
    model.base_model = torch.compile(model.base_model, backend="eager")
    return model


def compiled_layer(model):
    model.base_model.tall = torch.compile(model.base_model.tall, backend="eager")
    return model


def checkpointed_layer(model):
    model.base_model.tall = checkpoint_wrapper(model.base_model.tall)
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def in_parallel(model):
    return nn.ModuleDict({"module": model})  # as DistributedDataParallel names it


def unwrapped(model):
    return model


INNER = [unwrapped, compiled_base, compiled_layer, checkpointed_layer]
OUTER = [unwrapped, compiled, in_parallel]


@pytest.mark.parametrize(
    ("saved", "loaded", "outer"),
    thinned(
        list(product(INNER, INNER, OUTER)),
        lambda saved, loaded, outer: (saved, outer),
        lambda saved, loaded, outer: loaded,
        lambda saved, loaded, outer: saved == loaded,
    ),
)
def test_wrapped_and_plain_models_load_each_others_checkpoints(saved, loaded, outer):
    variant = {"bias": "all"}  # whose names are the base's own
    model = train(start(**variant))
    expected = model(chain_inputs(20))
    state = copied(outer(saved(model)).state_dict())
    resumed = loaded(start(seed=1, **variant))
    result = resumed.load_state_dict(state)
    assert result.missing_keys == result.unexpected_keys == []
    assert_gap(resumed(chain_inputs(20)), expected, 1e-6)
    other = loaded(start(True, **variant))
    with pytest.raises(ValueError, match="init_lora_weights='pissa' is not supported"):
        other.load_state_dict(state)


@pytest.mark.parametrize("outer", [compiled, in_parallel])
def test_a_plain_checkpoint_names_the_wrapper_that_it_does_not_reach(outer):
    state = copied(train(start()).state_dict())
    with pytest.raises(ValueError, match=r"Load it into the LoraModel itself.*_orig_mod"):
        outer(start()).load_state_dict(state)


class Module(nn.Module):
    """A user's module with a part called "module"."""

    def __init__(self):
        super().__init__()
        self.module = Chain()
        self.tall = nn.Linear(32, 32)

    def forward(self, x):
        return self.module(self.tall(x))


def test_a_part_called_module_keeps_its_name():
    def model():
        config = LoraConfig(r=2, target_modules=["tall"], init_lora_weights="orthogonal")
        return get_peft_model(Module(), config)

    source = train(model())
    resumed = model()
    resumed.load_state_dict(copied(source.state_dict()))
    after = resumed.state_dict()
    assert all(torch.equal(after[key], value) for key, value in source.state_dict().items())


# -- of another method or scaling ------------------------------------------------------------------


def stored(state, how, folder):
    """The state dict as a training framework reads it back."""
    if how == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, folder / "a")
        return load_file(folder / "a")
    if how == "torch":
        torch.save(state, folder / "a")
        return torch.load(folder / "a", weights_only=True)
    return copied(state)


@pytest.mark.parametrize(
    ("methods", "owned", "how"),
    every_value(
        product(
            [("pissa", True), (True, "pissa"), ("orthogonal", "pissa"), ("gaussian", True)],
            [False, True],
            ["memory", "torch", "safetensors"],
        ),
        3,
    ),
    ids=str,
)
def test_another_methods_checkpoint_is_refused(methods, owned, how, tmp_path):
    other, mine = methods
    source, model = train(start(other)), start(mine)
    if owned:
        source, model = nn.ModuleDict({"m": source}), nn.ModuleDict({"m": model})
    state = stored(source.state_dict(), how, tmp_path)
    whole = model["m"] if owned else model
    before = snapshot(whole.base_model)
    named = "kaiming" if other is True else other
    with pytest.raises(ValueError, match=f"init_lora_weights='{named}' is not supported"):
        model.load_state_dict(state)
    assert_unchanged(whole.base_model, before)


@pytest.mark.parametrize(
    ("other", "method", "how"),
    every_value(
        product(
            [{"lora_alpha": 12}, {"use_rslora": True}, {"alpha_pattern": {"tall": 12}}],
            ["pissa", True, "loftq"],
            ["memory", "safetensors"],
        ),
        3,
    ),
)
def test_another_scaling_is_refused(other, method, how, tmp_path):
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["square", "tall"]}
    config["init_lora_weights"] = method
    source = get_peft_model(Chain(), LoraConfig(**config | other))
    model = get_peft_model(Chain(), LoraConfig(**config))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the scaling of '(square|tall)' is 3: must be 1.5"):
        model.load_state_dict(stored(source.state_dict(), how, tmp_path))
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", ["pissa", True, "loftq"])
def test_a_checkpoint_of_a_former_version_is_loaded(method):
    model = train(start(method))
    state = copied(model.state_dict())
    del state["_extra_state"]
    resumed = start(method)
    result = resumed.load_state_dict(state)
    assert result.missing_keys == []
    assert torch.equal(resumed(chain_inputs(20)), model(chain_inputs(20)))


@pytest.mark.parametrize(("other", "mine"), [("pissa", True), (True, "pissa")])
def test_a_former_checkpoint_of_another_base_is_refused(other, mine):
    state = copied(train(start(other)).state_dict())
    del state["_extra_state"]
    model = start(mine)
    before = snapshot(model)
    with pytest.raises(ValueError, match="the initial B is .* for init_lora_weights="):
        model.load_state_dict(state)
    assert_unchanged(model, before)


def test_a_reinitialized_model_continues_another_methods_checkpoint():
    olora = train(start("olora"))
    model = reinitialize(start("pissa"), olora.peft_config)
    model.load_state_dict(copied(olora.state_dict()))
    x = chain_inputs(20)
    assert_gap(model(x), olora(x), 1e-5)


@pytest.mark.parametrize("method", REPLACING)
def test_a_replaced_base_cannot_follow(method):
    state = copied(start(method).state_dict())
    name = "base_model.square.initial_lora_A"
    model = start(method)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'base_model.square.initial_lora_A' differs.*quantized"):
        model.load_state_dict(state | {name: state[name] + 1})
    assert_unchanged(model, before)


# -- refusals, with nothing changed ----------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
@pytest.mark.parametrize("owned", [False, True], ids=["alone", "owned"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, k: s.pop(k), "'base_model.tall.lora_A' is only in this model"),
        (lambda s, k: s.update({k + "2": s[k]}), "'base_model.tall.lora_A2' is only in the check"),
        (lambda s, k: s.update({k: s[k][:2]}), r"'base_model.tall.lora_A' has shape \(2, 32\)"),
        (lambda s, k: s.update({k: s[k] * float("nan")}), "'base_model.tall.lora_A' contains NaN"),
        (
            lambda s, k: s.update({k.replace("lora_A", "base_layer.weight"): torch.ones(56, 32)}),
            "'base_model.tall.base_layer.weight' is only in the checkpoint",
        ),
    ],
    ids=["missing", "surplus", "shape", "nan", "base"],
)
def test_another_runs_checkpoint_is_refused(change, message, owned, strict):
    """Whatever `strict` says: a run that continues with half an adapter is a wrong one."""
    other = train(start("pissa", seed=1))
    model, prefix = start("pissa"), ""
    if owned:
        model, other, prefix = nn.ModuleDict({"m": model}), nn.ModuleDict({"m": other}), "m."
    state = copied(other.state_dict())
    change(state, f"{prefix}base_model.tall.lora_A")
    whole = model["m"] if owned else model
    before = snapshot(whole.base_model)
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state, strict=strict)
    assert_unchanged(whole.base_model, before)


@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_no_checkpoint_while_the_adapter_is_merged_or_off(state):
    """The tensors are other ones then: biases, and the base that must follow."""
    model = train(start(bias="all"))
    kept = copied(model.state_dict())
    if state == "merged":
        model.merge_adapter()
        with pytest.raises(RuntimeError, match=r"state_dict: the adapter is merged"):
            model.state_dict()
        with pytest.raises(RuntimeError, match=r"load_state_dict: the adapter is merged"):
            model.load_state_dict(kept)
        model.unmerge_adapter()
    else:
        with model.disable_adapter():
            with pytest.raises(RuntimeError, match=r"state_dict: the adapter is disabled"):
                model.state_dict()
            with pytest.raises(RuntimeError, match=r"load_state_dict: the adapter is disabled"):
                model.load_state_dict(kept)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in kept.items())


def test_parameters_can_be_assigned_except_the_bases():
    model = train(start("pissa", seed=1))
    resumed = start("pissa")
    resumed.load_state_dict(copied(model.state_dict()), assign=True)
    x = chain_inputs(20)
    assert_gap(resumed(x), model(x), 1e-5)
    state = copied(start(bias="all").state_dict())
    model = start(bias="all")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"assign=True is not supported with bias='all'"):
        model.load_state_dict(state, assign=True)
    assert_unchanged(model, before)
