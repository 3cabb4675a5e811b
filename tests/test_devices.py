"""Models and decompositions on CUDA, simulated: nothing is left on, or taken to, another device.

Placement is simulated (`simulated_device`), CUDA's kernels are not: numbers here are the CPU's, so
that results are compared to the bit. `test_gpu` is the real thing, where a device is present.
"""

import copy
import functools
import itertools

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from methods import METHODS, SPECS, behavior
from models import (
    VOCABULARY,
    Batches,
    bert,
    data_of,
    gpt2,
    llama,
    t5,
    t5_batches,
    token_batches,
)
from networks import PACKED_KINDS, Case
from packing import on_device
from products import every_value, thinned
from simulated_device import CPU, CUDA, PLACES, place, simulated_cuda
from torch import nn

from lora_init import (
    LoraConfig,
    LoraModel,
    WithLoss,
    calibrate,
    get_peft_model,
    init_factors,
    initialize_peft_model,
    list_initializers,
    load_peft_checkpoint,
    reinitialize,
    restore_peft_model,
)
from lora_init.calibration import sums
from lora_init.layers import linear, two_parts
from lora_init.linalg import dense, precision
from lora_init.linalg.gram import CachedBlocks

pytestmark = [
    pytest.mark.sampled(4),
    pytest.mark.filterwarnings("ignore:merged into .* quantized weights"),
    pytest.mark.filterwarnings("ignore:.*shared its weight with another module"),
]

PLACEMENTS = {"model": (CUDA, None), "decompositions": (CPU, CUDA)}
SETTINGS = {"eva": {"rho": 1.5}, "loftq": {"loftq_iter": 2}, "qpissa": {"iterations": 2}}
ONE_OF_EACH = ("kaiming", "pissa", "loftq", "eva")
COMBINATIONS = [
    pytest.param(spec, Case(kind), use_dora, id=f"{spec.name}-{kind}{'-dora' * use_dora}")
    for spec in list_initializers()
    for kind in ("Linear", "Conv2d", "Embedding")  # Conv1D is Linear the other way round
    for use_dora in (False, True)
    # DoRA is the layers' own: one method of each kind of base meets it.
    if kind in spec.module_types and (not use_dora or spec.name in ONE_OF_EACH)
]
COMBINATIONS += [
    pytest.param(spec, Case(kind), False, id=f"{spec.name}-{kind}")
    for spec in list_initializers()
    for kind in PACKED_KINDS
]
every_placement = pytest.mark.parametrize("placement", PLACEMENTS)


@pytest.fixture(autouse=True)
def same_solver(monkeypatch):
    """The CPU's own solvers and blocks of rows on both devices: others differ in the last bits."""
    monkeypatch.setattr(sums, "row_blocks", CachedBlocks)
    monkeypatch.setattr(dense, "PARTIAL_DIMENSION", float("inf"))
    monkeypatch.setattr(dense, "LAPACK_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(linear, "STACKED_POSITIONS", {"cpu": 2048, "cuda": 2048})
    monkeypatch.setattr(two_parts, "HAS_WIDE_PRODUCTS", False)


def assert_on(model, where):
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert place(tensor) == where, f"{name} is on {place(tensor)}"
        assert tensor.grad is None or place(tensor.grad) == where, f"the gradient of {name}"


def assert_same(actual, expected):
    """Equal to the bit, names included."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name].cpu(), value), name


def on_cpu(tensors):
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def figures(report):
    """An InitReport without what was measured by a clock."""
    values = report.to_dict() | {"seconds": None}
    return values | {"layers": [layer | {"seconds": None} for layer in values["layers"]]}


def config_of(method, targets, **settings):
    return LoraConfig(r=4, target_modules=list(targets), init_lora_weights=method, **settings)


# -- an adapter's life -----------------------------------------------------------------------------


def adapt(spec, case, model_on, device, seed=0, **settings):
    """Calibration batches are on the CPU, original weights too."""
    return get_peft_model(
        on_device(case.build(), model_on),
        config_of({"name": spec.name, **SETTINGS.get(spec.name, {})}, case.shapes, **settings),
        calibration=data_of(spec, case.calibration()),
        device=device,
        seed=seed,
        original_weights=case.originals() if spec.base == "replace" else None,
        keep_original=True,
    )


def life(spec, case, use_dora, model_on, device, folder):
    """Everything that an adapter can go through; returns what it was at every station.

    Asserts at each that all of the model is on `model_on`.
    """
    seen = {}
    model = adapt(spec, case, model_on, device, use_dora=use_dora)
    x = case.inputs(8).to(model_on)

    def station(name, subject=model):
        assert_on(subject, model_on)
        output = subject(x)
        assert place(output) == model_on
        seen[name] = output.detach().cpu().clone()

    seen |= {f"{name}.product": one.initial_product().cpu() for name, one in model.layers.items()}
    seen |= on_cpu(dict(model.named_parameters()) | dict(model.named_buffers()))
    report = figures(model.init_report())
    station("step 0")

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, foreach=True)  # its default on CUDA
    for _ in range(2):
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()
        assert_on(model, model_on)
        optimizer.step()
    station("trained")
    with model.disable_adapter():
        station("disabled")
    model.merge_adapter()
    station("merged")
    model.unmerge_adapter()
    station("unmerged")

    state = model.state_dict()
    tensors = [value for name, value in state.items() if not name.endswith("_extra_state")]
    assert {place(value) for value in tensors} == {model_on}  # the other names the start
    seen |= {f"state.{name}": value for name, value in on_cpu(state).items()}
    model.save_pretrained(folder)
    loaded = LoraModel.from_pretrained(
        on_device(case.build(), model_on), folder,
        original_weights=case.originals() if spec.base == "replace" else None,
    )  # fmt: skip
    station("loaded", loaded)
    seed = 0 if spec.base == "replace" else 1  # another start, where it may be another
    fresh = adapt(spec, case, model_on, device, seed, use_dora=use_dora)
    fresh.load_state_dict(on_cpu(state))
    station("checkpoint", fresh)

    twin = copy.deepcopy(model)
    station("merged for good", twin.merge_and_unload())
    again = reinitialize(model, config_of("pissa", list(case.shapes)[:1]), device=device)
    station("started again", again)
    station("unloaded", again.unload())
    return seen, report


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """The same lives on the CPU, without a simulation."""
    known = {}

    def on_the_cpu(spec, case, use_dora):
        key = spec.name, case, use_dora
        if key not in known:
            folder = tmp_path_factory.mktemp("life")
            known[key] = life(spec, case, use_dora, CPU, None, folder)
        return known[key]

    return on_the_cpu


@pytest.mark.parametrize(
    ("spec", "case", "use_dora", "placement"),
    thinned(
        [
            pytest.param(*combination.values, placement, id=f"{combination.id}-{placement}")
            for combination in COMBINATIONS
            for placement in PLACEMENTS
            # A model on the device has every method compute there; that results come back to a
            # model elsewhere is the schedule's work, and one method of each kind of base shows it.
            if placement == "model" or combination.values[0].name in ONE_OF_EACH
        ],
        # test_device_counts starts every method on the device.
        lambda spec, case, use_dora, placement: behavior(spec.name),
        lambda spec, case, use_dora, placement: (spec.base, case.kind),
        lambda spec, case, use_dora, placement: (case.kind, use_dora, placement),
    ),
)
def test_the_same_life_as_on_the_cpu(lives, spec, case, use_dora, placement, tmp_path):
    expected, expected_report = lives(spec, case, use_dora)
    with simulated_cuda():
        seen, report = life(spec, case, use_dora, *PLACEMENTS[placement], tmp_path)
    if case.kind == "Linear8bitLt" and placement == "model":  # bitsandbytes computes in 16 bits
        seen, expected = (
            {name: value for name, value in one.items() if name.endswith(".product")}
            for one in (seen, expected)
        )
    assert_same(seen, expected)
    assert report == expected_report


# -- a device without float64, as Apple's ----------------------------------------------------------


@pytest.fixture
def no_float64(monkeypatch):
    """A device on which a float64 tensor is an error."""
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ("cuda",))
    with simulated_cuda(has_float64=False):
        with pytest.raises(TypeError, match="has no float64"):
            torch.ones(2, device=CUDA).double()
        yield


@pytest.mark.parametrize(
    ("spec", "case", "use_dora"),
    thinned(
        [one for one in COMBINATIONS if one.values[1].kind == "Linear"],
        lambda spec, case, use_dora: (spec.base, use_dora),
        lambda spec, case, use_dora: "gradient" in spec.reads,
    ),
)
def test_the_same_life_without_float64(lives, spec, case, use_dora, monkeypatch, tmp_path):
    """Decompositions and sums run on the CPU; the adapter is where the model is."""
    expected, expected_report = lives(spec, case, use_dora)
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", ("cuda",))
    with simulated_cuda(has_float64=False):
        seen, report = life(spec, case, use_dora, CUDA, None, tmp_path)
    assert_same(seen, expected)
    assert report == expected_report


@pytest.mark.parametrize("device", [None, CUDA])
def test_other_entry_points_work_without_float64(no_float64, device):
    case = Case()
    base, batches, x = case.build(), case.calibration(), case.inputs()
    targets = list(case.shapes)
    expected = base(x)
    config = peft.LoraConfig(r=4, target_modules=targets)
    model = peft.get_peft_model(on_device(copy.deepcopy(base), CUDA), config).eval()
    initialize_peft_model(model, "pissa", device=device, verify=[x.to(CUDA)])
    torch.testing.assert_close(model(x.to(CUDA)).cpu(), expected)
    eva = config_of("eva", targets)
    on = on_device(copy.deepcopy(base), CUDA)
    statistics = calibrate(on, [eva], batches, device=device)
    get_peft_model(on, eva, calibration=statistics, device=device)
    weight = on_device(copy.deepcopy(base), CUDA).get_submodule(targets[0]).weight.detach()
    inputs = torch.randn(9, weight.shape[1]).to(CUDA)
    factors = init_factors(weight, "corda", r=2, inputs=inputs, device=device)
    assert place(factors.lora_A) == CUDA


# -- a model that moves ----------------------------------------------------------------------------


STARTED = [
    ("kaiming", True, Case(), "in_forward"),
    ("pissa", False, Case(), "in_forward"),
    ("pissa", True, Case(), "in_forward"),
    ("loftq", False, Case(), "in_forward"),
    ("pissa", False, Case("Linear4bit"), "in_forward"),
    ("pissa", True, Case("Linear4bit"), "requantize"),
]
MOVES = [(CPU, CUDA), (CUDA, CPU)]


@pytest.mark.parametrize(
    ("method", "use_dora", "case", "quantized_base", "start", "end"),
    every_value([(*started, *move) for started in STARTED for move in MOVES], 6),
    ids=str,
)
def test_a_model_that_moves(cuda, method, use_dora, case, quantized_base, start, end, tmp_path):
    """Trained, then moved while the adapter is on, off, merged or detached: all of it follows."""
    # In eval mode bitsandbytes repacks 4-bit weights on CPUs, and rounds them.
    base, inputs = case.build().train(), case.inputs()

    def outputs(*moves):
        config = config_of(
            {"name": method, **SETTINGS.get(method, {})}, ["square", "tall"],
            modules_to_save=None if case.packed else ["wide"],
            use_dora=use_dora, lora_bias=not use_dora, bias="all",
        )  # fmt: skip
        model = get_peft_model(
            copy.deepcopy(base).to(start), config, keep_original=True, quantized_base=quantized_base
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * parameter.sin())

        def output(step, subject=model):
            if step in moves:
                subject.to(end)
            where = end if set(moves) & set(steps[: steps.index(step) + 1]) else start
            assert_on(subject, where)
            return subject(inputs.to(where)).detach().cpu()

        seen = [output("on")]
        with model.disable_adapter():
            seen.append(output("off"))
        seen.append(output("on again"))
        model.merge_adapter()
        seen.append(output("merged"))
        model.unmerge_adapter()
        seen.append(output("unmerged"))
        model.save_pretrained(tmp_path)
        other = LoraModel.from_pretrained(copy.deepcopy(base).to(end), tmp_path)
        assert_on(other, end)
        seen.append(other(inputs.to(end)).detach().cpu())
        saved = {name: value.cpu() for name, value in model.state_dict().items()}
        detached = model.detach_adapter()
        seen.append(output("detached", model.base_model))
        model.attach_adapter(detached)
        seen.append(output("attached"))
        model.load_state_dict(saved)
        seen.append(output("loaded"))
        seen.append(output("unloaded", model.unload()))
        return seen

    steps = ["on", "off", "on again", "merged", "unmerged", "detached", "attached", "loaded"]
    steps.append("unloaded")
    expected = outputs()
    for step in ("on", "off", "merged", "detached", "unloaded"):
        for actual, other in zip(outputs(step), expected, strict=True):
            assert torch.equal(actual, other), f"moved at {step!r}"


class Split(nn.Module):
    """Its layers on two devices, as `device_map` places those of large models."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, 32)
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 48)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = torch.tanh(self.first(self.words(input_ids)))
        return self.second(hidden.to(self.second.weight.device))


@pytest.mark.parametrize(
    ("method", "device", "first", "second"),
    thinned(
        [(m, d, *move) for m in METHODS for d in (None, CUDA) for move in MOVES],
        lambda method, device, first, second: behavior(method),
        lambda method, device, first, second: (device, first, second),
    ),
)
def test_a_model_on_two_devices(cuda, method, device, first, second):
    def factors(first, second, device):
        base = Split()
        base.words.to(first)
        base.first.to(first)
        base.second.to(second)
        config = config_of({"name": method, **SETTINGS.get(method, {})}, ["first", "second"])
        batches = Batches(shifted(token_batches(count=2)))
        model = get_peft_model(
            base, config, calibration=data_of(config.initializer()[0], batches), device=device
        )
        assert_on(model.first, first)
        assert_on(model.second, second)
        batch = token_batches(count=1)[0]
        model(batch["input_ids"].to(first)).sum().backward()
        return on_cpu(dict(model.named_parameters()))

    assert_same(factors(first, second, device), factors(CPU, CPU, None))


@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Conv2d(8, 8, 3)])
@pytest.mark.parametrize("method", ["kaiming", "pissa", "eva", "lora_ga"])
def test_a_layer_whose_hook_moves_its_input(cuda, method, make, use_dora):
    """At a boundary of `device_map`, Accelerate's hook moves the input inside the layer's call."""

    def run(where):
        torch.manual_seed(0)
        model = nn.Sequential(make(), make())
        if where == CUDA:
            hook = AlignDevicesHook(execution_device=torch.device(where, 0))
            add_hook_to_module(model[1].to(where), hook)
        x = torch.randn(3, 8, 8, 8)
        batches = WithLoss([x], lambda model, x: model(x).square().mean())
        config = LoraConfig(
            r=2, target_modules=["0", "1"], init_lora_weights=method, use_dora=use_dora
        )
        model = get_peft_model(model, config, calibration=batches)
        second = model.layers["1"]
        assert_on(second, where)
        output = model(x)
        output.sum().backward()
        return on_cpu({"output": output, "A": second.lora_A, "gradient": second.lora_B.grad})

    expected = run(CPU)
    for name, value in run(CUDA).items():  # a layer with a hook computes in another order
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


# -- what initializers are made of -----------------------------------------------------------------


OPTIONS = [
    {"name": "corda", "corda_method": "kpm"},
    {"name": "corda", "damping": 0.01},
    {"name": "eva", "whiten": True, "center": False},
    {"name": "loftq", "loftq_bits": 2, "quantizer": "uniform", "loftq_iter": 1},
    {"name": "loftq", "loftq_bits": 8},
    {"name": "qpissa", "bits": 2, "iterations": 2},
    {"name": "pissa", "niter": 2},
    {"name": "pissa", "method": "krylov"},
    {"name": "pissa", "method": "exact"},
]


@pytest.mark.parametrize(
    ("options", "placement"), every_value(itertools.product(OPTIONS, PLACEMENTS), 2), ids=str
)
def test_options(cuda, options, placement):
    case, (model_on, device) = Case(), PLACEMENTS[placement]

    def products(model_on, device):
        model = get_peft_model(
            case.build().to(model_on),
            config_of(options, case.shapes),
            calibration=case.calibration(),
            device=device,
        )
        assert_on(model, model_on)
        return {name: layer.initial_product().cpu() for name, layer in model.layers.items()}

    assert_same(products(model_on, device), products(CPU, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_placement
def test_16_bit_models_and_adapters(cuda, dtype, placement):
    case, (model_on, device) = Case(dtype=dtype), PLACEMENTS[placement]
    for adapter_dtype in (torch.float32, dtype):
        outputs = []
        for model_on, device in ((CPU, None), PLACEMENTS[placement]):
            model = get_peft_model(
                case.build().to(model_on), config_of("pissa", case.shapes, use_dora=True),
                device=device, adapter_dtype=adapter_dtype,
            )  # fmt: skip
            outputs.append(model(case.inputs().to(model_on)).cpu())
        assert torch.equal(*outputs)


# -- transformers, and PEFT ------------------------------------------------------------------------

ARCHITECTURES = {
    "llama": (lambda: llama(tied=True), ["q_proj", "down_proj", "embed_tokens"], token_batches),
    "gpt2": (gpt2, ["c_attn", "lm_head"], token_batches),
    "bert": (bert, ["query", "pooler.dense"], token_batches),
    "t5": (t5, ["q"], t5_batches),
}


def shifted(batches):
    """With labels, some of which are left out."""
    for batch in batches:
        labels = batch["input_ids"].clone()
        labels[:, :3] = -100
        yield batch | {"labels": labels}


def life_of_a_transformer(architecture, method, model_on, device):
    build, targets, batches = ARCHITECTURES[architecture]
    if method in ("eva", "corda"):
        targets = [name for name in targets if name != "embed_tokens"]
    data = batches(count=2)
    model = get_peft_model(
        build().to(model_on),
        config_of({"name": method, **SETTINGS.get(method, {})}, targets),
        calibration=data if architecture == "bert" else list(shifted(data)),
        device=device,
        keep_original=True,
    )
    assert_on(model, model_on)
    inputs = {name: value.to(model_on) for name, value in data[0].items()}
    seen = {f"{name}.A": layer.lora_A.detach() for name, layer in model.layers.items()}
    seen["step 0"] = model(**inputs).logits
    seen["step 0"].float().logsumexp(-1).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    seen["trained"] = model(**inputs).logits
    with model.disable_adapter():
        seen["disabled"] = model(**inputs).logits
    seen["merged"] = copy.deepcopy(model).merge_and_unload()(**inputs).logits
    seen["unloaded"] = model.unload()(**inputs).logits
    return on_cpu(seen)


@functools.cache
def life_of_a_transformer_on_the_cpu(architecture, method):
    return life_of_a_transformer(architecture, method, CPU, None)


@pytest.mark.parametrize(
    ("architecture", "method", "placement"),
    every_value(itertools.product(ARCHITECTURES, ["pissa", "loftq", "eva"], PLACEMENTS), 3),
)
def test_transformers(architecture, method, placement):
    """Tied weights, masks and labels; calibration batches are on the CPU."""
    expected = life_of_a_transformer_on_the_cpu(architecture, method)
    with simulated_cuda():
        seen = life_of_a_transformer(architecture, method, *PLACEMENTS[placement])
    assert_same(seen, expected)


def life_under_peft(method, use_dora, model_on, device, folder):
    case = Case()
    options = {"name": method, **SETTINGS.get(method, {})}
    config = peft.LoraConfig(r=4, target_modules=list(case.shapes), use_dora=use_dora)
    fresh = functools.partial(peft.get_peft_model, peft_config=config)
    model = fresh(case.build().to(model_on))
    data = data_of(SPECS[method], case.calibration())
    report = initialize_peft_model(model, options, calibration=data, device=device)
    assert_on(model, model_on)
    x = case.inputs(8).to(model_on)
    seen = {"step 0": model(x)}
    seen["step 0"].pow(2).sum().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True).step()
    seen["trained"] = model(x)
    with model.disable_adapter():
        seen["disabled"] = model(x)
    model.save_pretrained(folder)
    loaded = fresh(case.build().to(model_on))
    load_peft_checkpoint(loaded, folder)
    assert_on(loaded, model_on)
    seen["loaded"] = loaded(x)
    restore_peft_model(model)
    assert_on(model, model_on)
    seen["restored"] = model.base_model.model.square.base_layer.weight
    return on_cpu(seen), figures(report)


@pytest.fixture(scope="module")
def lives_under_peft(tmp_path_factory):
    """Those on the CPU, one for both placements."""
    return functools.cache(
        lambda method, use_dora: life_under_peft(
            method, use_dora, CPU, None, tmp_path_factory.mktemp("cpu")
        )
    )


@pytest.mark.parametrize(
    ("method", "use_dora", "placement"),
    thinned(
        [
            pytest.param(method, dora, placement, id=f"{method}{'-dora' * dora}-{placement}")
            for method in METHODS
            for dora in (False, True)
            for placement in PLACEMENTS
            if (not dora or method in ONE_OF_EACH) and not SPECS[method].has_core
        ],
        lambda method, use_dora, placement: behavior(method),
        lambda method, use_dora, placement: (use_dora, placement),
    ),
)
def test_under_peft(lives_under_peft, method, use_dora, placement, tmp_path):
    """PEFT's model lives on the device, and our methods start it."""
    expected, expected_report = lives_under_peft(method, use_dora)
    with simulated_cuda():
        seen, report = life_under_peft(method, use_dora, *PLACEMENTS[placement], tmp_path)
    assert_same(seen, expected)
    assert report == expected_report


@pytest.mark.parametrize(
    ("method", "use_dora", "start", "end"),
    thinned(
        [(m, dora, *move) for m in ("pissa", "loftq") for dora in (False, True) for move in MOVES],
        lambda method, use_dora, start, end: (method, start),
        lambda method, use_dora, start, end: use_dora,
    ),
)
def test_a_peft_model_that_moves(cuda, method, use_dora, start, end, tmp_path):
    """Disabled, saved, loaded and restored on another device than it was initialized on."""
    case = Case()
    x = case.inputs(8)
    config = peft.LoraConfig(
        r=4, target_modules=["square", "tall"], use_dora=use_dora, modules_to_save=["wide"]
    )

    def outputs(end, folder):
        model = peft.get_peft_model(case.build().to(start), config)
        initialize_peft_model(model, {"name": method, **SETTINGS.get(method, {})})
        model.to(end)
        assert_on(model, end)
        seen = {"moved": model(x.to(end))}
        with model.disable_adapter():
            seen["disabled"] = model(x.to(end))
        model.save_pretrained(folder)
        loaded = peft.get_peft_model(case.build().to(start), config)
        load_peft_checkpoint(loaded, folder)
        assert_on(loaded, start)
        seen["loaded"] = loaded(x.to(start))
        model.load_adapter(folder, "default")
        seen["loaded again"] = model(x.to(end))
        restore_peft_model(model)
        assert_on(model, end)
        seen["restored"] = model.base_model.model.square.base_layer.weight
        return on_cpu(seen)

    assert_same(outputs(end, tmp_path / "moved"), outputs(start, tmp_path / "still"))


@pytest.mark.parametrize("setting", [True, "pissa"])
def test_adapters_of_peft(cuda, setting, tmp_path):
    """Written by PEFT on the device, loaded by us on either."""
    case = Case()
    config = peft.LoraConfig(r=4, target_modules=list(case.shapes), init_lora_weights=setting)
    model = peft.get_peft_model(case.build().to(CUDA), config)
    model.save_pretrained(tmp_path / "start")
    outputs = []
    for where in PLACES:
        loaded = LoraModel.from_pretrained(case.build().to(where), tmp_path / "start")
        assert_on(loaded, where)
        outputs.append(loaded(case.inputs().to(where)).detach().cpu())
    assert torch.equal(*outputs)
