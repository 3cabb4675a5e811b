"""What PEFT's methods compute after a subtracting start, on every kind of base."""

import copy
import pickle

import peft
import pytest
import torch
from measures import EPSILON, assert_gap, assert_unchanged, relative_gap, snapshot, train
from models import llama, token_batches
from networks import Case
from packing import kept_plain
from torch import nn

from lora_init import (
    LoraModel,
    initialize_peft_model,
    load_peft_checkpoint,
    restore_peft_model,
    save_peft_model,
)
from lora_init.peft_models.layers import adapted_layers
from lora_init.weights.kinds import oriented_weight

pytestmark = pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to")

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BASES = ["Linear", "bfloat16", "float16", "Linear4bit", "Linear8bitLt", "Conv1D", "Embedding"]
PACKED = ("Linear4bit", "Linear8bitLt")


def network(kind):
    """A base, its targets and inputs; PEFT finds packed layers by a mark of the model."""
    case = Case("Linear", HALF[kind]) if kind in HALF else Case(kind)
    base = (kept_plain(case.build()) if case.packed else case.build()).eval()
    if case.packed:
        setattr(base, f"is_loaded_in_{kind[6]}bit", True)
    return base, list(case.shapes), case.inputs()


def tolerance(kind):
    return EPSILON[HALF[kind]] if kind in HALF else 2e-5


def started(kind, method="pissa", **settings):
    base, targets, x = network(kind)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **settings)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    if kind == "Embedding" and method == "olora":
        pytest.skip("olora does not support embeddings")
    initialize_peft_model(model, method)
    return model, base, x


def outputs(model, x, **settings):
    with torch.no_grad():
        return model(x, **settings)


def layers_of(model, adapter="default"):
    return adapted_layers(model, adapter)


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("kind", BASES)
def test_step_0_and_the_disabled_model_are_the_base(kind, method):
    model, base, x = started(kind, method)
    expected = outputs(base, x)
    assert outputs(model, x).dtype == expected.dtype
    assert_gap(outputs(model, x), expected, 0.0 if kind in HALF else tolerance(kind))
    train(model)
    assert relative_gap(outputs(model, x), expected) > 5 * tolerance(kind)
    with model.disable_adapter():
        assert_gap(outputs(model, x), expected, tolerance(kind))
    restore = [lambda model: None] if kind in PACKED or kind in HALF else []
    for change in (*restore, restore_peft_model):
        change(model)
        for layer in layers_of(model):
            weight = oriented_weight(base.get_submodule(layer.name))
            exact = 0.0 if restore else 1e-6
            assert_gap(oriented_weight(layer.base), weight, exact)


@pytest.mark.parametrize("kind", HALF)
def test_the_saved_file_is_a_plain_adapter_of_the_base(kind, tmp_path):
    model, base, x = started(kind)
    expected = outputs(train(model), x)
    save_peft_model(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    # PEFT adds a product of rank 2r in one go, and rounds once more.
    assert_gap(outputs(loaded, x), expected, 2 * tolerance(kind))
    ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_gap(outputs(ours, x), expected, 2 * tolerance(kind))


@pytest.mark.parametrize("kind", BASES)
def test_rows_without_an_adapter_get_the_base(kind):
    model, base, x = started(kind)
    train(model)
    adapted, original = outputs(model, x), outputs(base, x)
    names = ["__base__" if row % 3 else "default" for row in range(len(x))]
    mixed = outputs(model, x, adapter_names=names)
    for row, name in enumerate(names):
        expected = original if name == "__base__" else adapted
        assert_gap(mixed[row], expected[row], 4 * tolerance(kind))


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_merging_takes_the_start_along(kind, safe_merge):
    model, _, x = started(kind)
    expected = outputs(train(model), x)
    loss = {"Linear4bit": 0.3, "Linear8bitLt": 0.03}.get(kind, 5 * tolerance(kind))
    model.merge_adapter(safe_merge=safe_merge)
    assert_gap(outputs(model, x), expected, loss)
    model.unmerge_adapter()
    assert_gap(outputs(model, x), expected, loss)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert_gap(outputs(merged, x), expected, loss)
    assert not any("initial" in name for name, _ in merged.named_modules())
    assert not any(module._forward_hooks for module in merged.modules())
    with pytest.raises(ValueError, match="was not initialized"):
        restore_peft_model(model)


@pytest.mark.parametrize("kind", ["Linear", "bfloat16", "Linear4bit", "Embedding"])
def test_copies_and_pickles_subtract_their_own_start(kind):
    model, base, x = started(kind)
    expected = outputs(train(model), x)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    restore_peft_model(model)
    for twin in twins:
        assert_gap(outputs(twin, x), expected, tolerance(kind))
        with twin.disable_adapter():
            assert_gap(outputs(twin, x), outputs(base, x), tolerance(kind))
        restore_peft_model(twin)
        assert_gap(outputs(twin, x), outputs(base, x), tolerance(kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["bfloat16", "Linear4bit", "Linear8bitLt"])
def test_an_adapter_that_is_cast_still_cancels(kind, dtype, tmp_path):
    """Trainers cast the adapter of a quantized model to bfloat16 after its start."""
    model, base, x = started(kind)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    exact = max(tolerance(kind), EPSILON[dtype])
    assert_gap(outputs(model, x), outputs(base, x), exact)
    expected = outputs(train(model), x)
    save_peft_model(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_gap(outputs(loaded, x), expected, 10 * exact)


@pytest.mark.parametrize("kind", ["Linear", "bfloat16", "Linear4bit"])
def test_autocast_and_checkpointing_do_not_move_step_0(kind):
    model, base, x = started(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # An edited base is rounded by autocast, as any weight is.
        exact = 0.05 if kind == "Linear" else 3 * EPSILON[torch.bfloat16]
        assert_gap(outputs(model, x).float(), outputs(base, x).float(), exact)
    train(model)
    gradients = {}
    for name in ("plain", "checkpointed"):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        if name == "plain":
            output = model(inputs)
        else:
            output = torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=False)
        output.float().square().sum().backward()
        gradients[name] = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(*gradients.values(), strict=True):
        assert torch.equal(one, other)


# Without Linear8bitLt: PEFT's DoRA fails there at the second forward pass, whatever the start.
@pytest.mark.parametrize("kind", ["bfloat16", "Linear4bit", "Conv1D", "Embedding"])
def test_dora_norms_are_those_of_the_subtracted_weight(kind, tmp_path):
    model, base, x = started(kind, use_dora=True)
    exact = 0.02 if kind == "bfloat16" else tolerance(kind)
    assert_gap(outputs(model, x), outputs(base, x), exact)
    expected = outputs(train(model), x)
    with model.disable_adapter():
        assert_gap(outputs(model, x), outputs(base, x), exact)
    save_peft_model(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_gap(outputs(loaded, x), expected, 2 * exact)
    if kind not in PACKED:
        assert_gap(outputs(model.merge_and_unload(), x), expected, 2 * exact)


@pytest.mark.parametrize("kind", PACKED)
def test_dora_with_dropout_on_a_quantized_base_is_refused(kind):
    base, targets, _ = network(kind)
    config = peft.LoraConfig(r=4, target_modules=targets, use_dora=True, lora_dropout=0.1)
    model = peft.get_peft_model(base, config)
    before = snapshot(model)
    with pytest.raises(ValueError, match="lora_dropout=0.1 with use_dora=True is not supported"):
        initialize_peft_model(model, "pissa")
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", PACKED)
def test_requantizing_stays_available(kind, tmp_path):
    base, targets, x = network(kind)
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    ).eval()
    report = initialize_peft_model(model, "pissa", quantized_base="requantize")
    assert {row.base for row in report.layers} == {"replaced"}
    assert relative_gap(outputs(model, x), outputs(base, x)) > 1e-4
    with pytest.raises(ValueError, match="get_peft_model_state_dict is not supported"):
        peft.get_peft_model_state_dict(model)
    restore_peft_model(model)
    assert_gap(outputs(model, x), outputs(base, x), 1e-6)
    with pytest.raises(ValueError, match="quantized_base"):
        initialize_peft_model(model, "pissa", quantized_base="packed")


def test_requantizing_a_part_of_the_base_is_saved_and_loaded(tmp_path):
    """The float layer is edited, so its A0 and B0 are in the file of the replaced ones."""
    base, targets, x = network("Linear4bit")
    base = nn.Sequential(base, nn.Linear(outputs(base, x).shape[-1], 6)).eval()
    base.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=4, target_modules=[*(f"0.{name}" for name in targets), "1"])

    def wrapped():
        return peft.get_peft_model(copy.deepcopy(base), config).eval()

    model = wrapped()
    report = initialize_peft_model(model, "pissa", quantized_base="requantize")
    assert {row.base for row in report.layers} == {"replaced", "edited"}
    expected = outputs(train(model), x)
    model.save_pretrained(tmp_path)
    resumed = wrapped()
    load_peft_checkpoint(resumed, tmp_path)
    assert_gap(outputs(resumed, x), expected, 1e-6)
    train(resumed, seed=6)
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    assert_gap(outputs(resumed.eval(), x), expected, 1e-6)


def test_replicas_subtract_their_own_start():
    """What DataParallel does with a module: shallow copies, with other buffers."""
    model, _, x = started("bfloat16")
    layer = next(module for module in model.modules() if hasattr(module, "get_delta_weight"))
    replica = layer._replicate_for_data_parallel()
    inner = layer.base_layer._replicate_for_data_parallel()
    inner._parameters = dict(layer.base_layer._parameters)
    inner._modules = dict(layer.base_layer._modules)
    replica._modules = {**layer._modules, "base_layer": inner}
    assert torch.equal(outputs(replica, x), outputs(layer, x))


def test_a_language_model_with_a_reference_adapter():
    """As TRL makes its reference: a copy of the adapter next to it, cast apart from it."""
    base, batches = llama().bfloat16(), token_batches()
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    initialize_peft_model(model, "pissa")
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
            parameter.data = parameter.data.bfloat16()
    expected = [base(**batch).logits for batch in batches]
    for name in ("default", "ref"):
        model.set_adapter(name)
        actual = [model(**batch).logits for batch in batches]
        assert_gap(actual, expected, 2 * EPSILON[torch.bfloat16])


class Tower(nn.Module):
    """Calls its layer by keyword."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16).bfloat16()

    def forward(self, x):
        return self.layer(x=x) if hasattr(self.layer, "base_layer") else self.layer(x)


def test_a_layer_that_is_called_by_keyword():
    base = Tower()
    x = torch.randn(3, 16).bfloat16()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["layer"]))
    initialize_peft_model(model, "pissa")
    assert_gap(outputs(model, x), outputs(base, x), EPSILON[torch.bfloat16])
    with model.disable_adapter():
        assert_gap(outputs(model, x), outputs(base, x), 0.0)
