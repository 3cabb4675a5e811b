"""Models that are not in memory: on the meta device with a checkpoint, or offloaded by Accelerate.

Every comparison is with the same model loaded whole; from the same file where the factors are to
be the same to the bit, because a matrix product's rounding depends on how its input is aligned.
"""

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys

import accelerate
import accelerate.hooks
import bitsandbytes
import pytest
import torch
from measures import logits
from models import bert, gpt2, llama, token_batches
from networks import Case
from products import every_value
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_init import LoraConfig, LoraModel, calibrate, get_peft_model, reinitialize
from lora_init.layers import LoraLayer
from lora_init.weights import checkpoint as original_weights

pytestmark = pytest.mark.sampled(3)

METHODS = [True, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "loftq", "qpissa"]
MODELS = {"llama": llama, "tied": lambda: llama(tied=True), "gpt2": gpt2, "bert": bert}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of every model, llama's in shards with an index."""
    made = {}
    for name, build in MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        build().save_pretrained(made[name], max_shard_size="50KB" if name == "llama" else "1GB")
    assert len(list(made["llama"].glob("model-*.safetensors"))) > 2
    return made


def unloaded(build, dtype=torch.float32):
    """The model as ``with torch.device("meta")`` builds it."""
    model = build()
    with torch.device("meta"):
        return type(model)(model.config).eval().to(dtype)


def from_folder(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def config(method=True, **settings):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    return LoraConfig(init_lora_weights=method, **settings)


def assert_same_start(lazy, loaded):
    assert list(lazy.layers) == list(loaded.layers)
    for name, layer in lazy.layers.items():
        for part in ("lora_A", "lora_B", "initial_lora_A", "initial_lora_B"):
            value = getattr(layer, part)
            assert value.device.type == "cpu"
            assert torch.equal(value, getattr(loaded.layers[name], part)), (name, part)


def assert_same_logits(one, other):
    pairs = zip(logits(one, token_batches()), logits(other, token_batches()), strict=True)
    for left, right in pairs:
        assert torch.equal(left, right)


def assert_near_logits(model, expected, tolerance=1e-5):
    for one, other in zip(logits(model, token_batches()), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# -- on the meta device ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"), every_value(itertools.product(["llama", "gpt2"], METHODS), 2)
)
def test_the_loaded_models_adapter(name, method, folders, tmp_path):
    folder = folders[name]
    lazy = get_peft_model(unloaded(MODELS[name]), config(method), original_weights=folder)
    loaded = get_peft_model(from_folder(folder), config(method))
    assert_same_start(lazy, loaded)
    base = [p for n, p in lazy.named_parameters() if "lora_" not in n]
    assert base
    assert all(parameter.is_meta for parameter in base)
    lazy.save_pretrained(tmp_path)
    assert_same_logits(LoraModel.from_pretrained(from_folder(folder), tmp_path), loaded)


@pytest.mark.parametrize("method", ["corda", "eva", "lora_ga"])
def test_a_calibration_of_the_loaded_model(method, folders, tmp_path):
    batches = [batch | {"labels": batch["input_ids"]} for batch in token_batches()]
    found = calibrate(llama(), config(method), batches)
    folder = folders["llama"]
    lazy = get_peft_model(
        unloaded(llama), config(method), calibration=found, original_weights=folder
    )
    loaded = get_peft_model(from_folder(folder), config(method), calibration=found)
    assert_same_start(lazy, loaded)
    lazy.save_pretrained(tmp_path)
    assert_same_logits(LoraModel.from_pretrained(from_folder(folder), tmp_path), loaded)


@pytest.mark.parametrize("kind", ["Conv2d", "Embedding", "Conv1D"])
@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_every_float_module_type(kind, method, tmp_path):
    case = Case(kind)
    settings = config(method, r=2, target_modules=list(case.shapes))
    lazy = get_peft_model(
        case.build().to("meta"), settings, original_weights=case.build().state_dict()
    )
    loaded = get_peft_model(case.build(), settings)
    assert_same_start(lazy, loaded)
    lazy.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(case.build(), tmp_path)
    assert torch.equal(again(case.inputs()), loaded(case.inputs()))


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16,) * 2],
    ids=str,
)
def test_the_modules_dtype_counts(stored, dtype):
    """As where a checkpoint is loaded: its values are rounded to the module's dtype."""
    state = llama().to(stored).state_dict()
    loaded = llama().to(dtype)
    loaded.load_state_dict(state)
    lazy = get_peft_model(unloaded(llama, dtype), config("olora"), original_weights=state)
    assert_same_start(lazy, get_peft_model(loaded, config("olora")))


def empty(build):
    """The model as Accelerate builds it, in which tied weights are two parameters."""
    model = build()
    with accelerate.init_empty_weights():
        return type(model)(model.config).eval()


@pytest.mark.parametrize("make", [unloaded, empty])
@pytest.mark.parametrize("method", [True, "pissa"])
def test_tied_weights(method, make, folders, tmp_path):
    """The file holds one of the two names, and both modules are adapted."""
    assert "lm_head.weight" not in load_file(folders["tied"] / "model.safetensors")
    settings = config(method, target_modules=["lm_head", "embed_tokens", "q_proj"])
    folder = folders["tied"]
    lazy = get_peft_model(make(MODELS["tied"]), settings, original_weights=folder)
    loaded = get_peft_model(from_folder(folder), settings)
    assert lazy.plan.targets == loaded.plan.targets
    assert {t.name: t.shared_with for t in lazy.plan.targets if t.shared_with} == {
        "model.embed_tokens": ("lm_head.weight",), "lm_head": ("model.embed_tokens.weight",)
    }  # fmt: skip
    assert_same_start(lazy, loaded)
    lazy.save_pretrained(tmp_path)
    assert_same_logits(LoraModel.from_pretrained(from_folder(folder), tmp_path), loaded)


@pytest.mark.parametrize("method", [True, "pissa", "qpissa"])
def test_dora(method, folders, tmp_path):
    lazy = get_peft_model(
        unloaded(llama), config(method, use_dora=True), original_weights=folders["llama"]
    )
    loaded = get_peft_model(llama(), config(method, use_dora=True))
    for name, layer in lazy.layers.items():
        expected = loaded.layers[name].lora_magnitude_vector
        torch.testing.assert_close(layer.lora_magnitude_vector, expected, rtol=1e-6, atol=0)
    lazy.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(llama(), tmp_path)
    assert_near_logits(again, logits(loaded, token_batches()))


@pytest.mark.parametrize("method", [True, "pissa", "loftq"])
def test_the_loaded_models_report(method, folders):
    lazy = get_peft_model(unloaded(llama), config(method), original_weights=folders["llama"])
    loaded = get_peft_model(llama(), config(method))
    pairs = zip(lazy.init_report().layers, loaded.init_report().layers, strict=True)
    for ours, theirs in pairs:
        for figure in ("relative_norm", "norm_A", "norm_B", "captured_energy", "error"):
            expected = getattr(theirs, figure)
            if expected is not None:
                expected = pytest.approx(expected, rel=1e-5)
            assert getattr(ours, figure) == expected
        assert list(ours.details) == list(theirs.details)


def test_only_the_targets_are_read(folders, monkeypatch):
    read = []
    real = original_weights.OriginalWeights.weight

    def spy(self, name, *expert):
        read.append(name)
        return real(self, name, *expert)

    monkeypatch.setattr(original_weights.OriginalWeights, "weight", spy)
    settings = config("olora", target_modules=["v_proj"])
    lazy = get_peft_model(unloaded(llama), settings, original_weights=folders["llama"])
    assert set(read) == {f"model.layers.{i}.self_attn.v_proj" for i in range(2)} == set(lazy.layers)


def test_a_dry_run_needs_no_weights():
    plan = get_peft_model(unloaded(llama), config("pissa"), dry_run=True)
    assert plan.targets == get_peft_model(llama(), config("pissa"), dry_run=True).targets


# -- life without a base ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["olora", "loftq"])
def test_unloaded_adapters_come_back(method, folders):
    base = unloaded(llama)
    before = dict(base.named_parameters())
    lazy = get_peft_model(base, config(method), original_weights=folders["llama"])
    start = copy.deepcopy(lazy.state_dict())
    lazy.attach_adapter(lazy.detach_adapter())
    for key, value in lazy.state_dict().items():
        assert torch.equal(value, start[key])
    again = reinitialize(lazy, config("pissa"), original_weights=folders["llama"])
    assert_same_start(again, get_peft_model(from_folder(folders["llama"]), config("pissa")))
    restored = again.unload()
    assert restored is base
    after = dict(base.named_parameters())
    assert list(after) == list(before)
    assert all(value is after[name] for name, value in before.items())
    assert not any(isinstance(module, LoraLayer) for module in base.modules())


def test_copies_read_on(folders):
    lazy = get_peft_model(unloaded(llama), config("olora"), original_weights=folders["llama"])
    for twin in (copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        assert twin.init_report().to_dict()["layers"] == lazy.init_report().to_dict()["layers"]


def test_a_checkpoint_of_another_start(folders, tmp_path):
    start = config("orthogonal")
    lazy = get_peft_model(unloaded(llama), start, original_weights=folders["llama"])
    other = get_peft_model(llama(), start, seed=1)
    lazy.load_state_dict(other.state_dict())
    lazy.save_pretrained(tmp_path)
    assert_same_logits(LoraModel.from_pretrained(llama(), tmp_path), other)


@pytest.mark.parametrize("method", [True, "pissa", "loftq"])
def test_an_adapter_read_without_its_base(method, folders, tmp_path):
    """Onto the meta device and off it again: the file stays the same."""
    get_peft_model(llama(), config(method)).save_pretrained(tmp_path / "first")
    with pytest.raises(ValueError, match="'model.layers.0.*is on the meta device.*pass original_w"):
        LoraModel.from_pretrained(unloaded(llama), tmp_path / "first")
    lazy = LoraModel.from_pretrained(
        unloaded(llama), tmp_path / "first", original_weights=folders["llama"]
    )
    lazy.save_pretrained(tmp_path / "second")
    (file,) = (tmp_path / "first").glob("*.safetensors")
    first, second = load_file(file), load_file(tmp_path / "second" / file.name)
    assert list(first) == list(second)
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_loaded_model_holds_no_checkpoint():
    """A mapping of the original weights would double a quantised model's memory."""
    case = Case("Linear4bit")
    model = get_peft_model(
        case.build(), config("pissa", target_modules=["tall"]), original_weights=case.originals()
    )
    assert model.detach_adapter().weights.originals is None


# -- refusals --------------------------------------------------------------------------------------


def refused(message, model, settings, error=ValueError, **arguments):
    before = [(n, m) for n, m in model.named_modules()]
    with pytest.raises(error, match=message):
        get_peft_model(model, settings, **arguments)
    assert [(n, m) for n, m in model.named_modules()] == before
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_no_checkpoint():
    message = "'model.layers.0.self_attn.q_proj': its weight is on the meta .*pass original_weights"
    for method in (True, "pissa"):
        refused(message, unloaded(llama), config(method))


def test_another_models_checkpoint():
    state = llama().state_dict()
    name = "model.layers.1.mlp.up_proj"
    message = rf"'{name}' is \(64, 96\) there and \(96, 64\) in the model; .*checkpoint of this mo"
    swapped = state | {f"{name}.weight": state[f"{name}.weight"].T}
    refused(message, unloaded(llama), config(), original_weights=swapped)
    del state[f"{name}.weight"]
    message = f"no weight for '{name}'.*nearest are 'model.layers.0.mlp.up_proj'"
    refused(message, unloaded(llama), config(), original_weights=state)
    both = {k.replace("layers.", ""): v for k, v in llama().state_dict().items() if "layers.1" in k}
    refused("no weight for|both find", unloaded(llama), config(), original_weights=both)


def test_a_damaged_weight(folders):
    state = llama().state_dict()
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    message = "'model.layers.1.mlp.up_proj': its weight holds NaN"
    refused(message, unloaded(llama), config("pissa"), original_weights=state)


def test_a_quantised_weight_on_the_meta_device():
    kinds = bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt
    with torch.device("meta"):
        model = nn.Sequential(*(kind(64, 64) for kind in kinds))
    for target in ("0", "1"):
        refused(
            f"target '{target}': its quantized weight is on the meta device.*quantization_config",
            model, config(target_modules=[target]), original_weights={},
        )  # fmt: skip


@pytest.mark.parametrize("method", ["corda", "eva"])
def test_methods_that_run_the_model(method, folders):
    refused(
        f"'{method}' needs a forward pass, and 'model.embed_tokens.weight' .*lora_init.calibrate",
        unloaded(llama), config(method),
        original_weights=folders["llama"], calibration=token_batches(),
    )  # fmt: skip


def test_parts_that_are_trained_themselves(folders):
    refused(
        "modules_to_save trains 'lm_head.weight', which is on the meta device.*load this part",
        unloaded(llama), config(modules_to_save=["lm_head"], target_modules=["q_proj"]),
        original_weights=folders["llama"],
    )  # fmt: skip
    refused(
        "bias='lora_only' trains 'bert.encoder.*bias', which is on the meta device.*leave it out",
        unloaded(bert), config(bias="lora_only", target_modules=["query"]),
        original_weights=folders["bert"],
    )  # fmt: skip


def test_what_needs_the_base(folders):
    lazy = get_peft_model(unloaded(llama), config("olora"), original_weights=folders["llama"])
    with pytest.raises(RuntimeError, match="'model.embed_tokens.weight' .*never loaded.*Save the"):
        lazy(**token_batches(count=1)[0])
    for call in (lazy.merge_adapter, lazy.merge_and_unload):
        with pytest.raises(RuntimeError, match=r"q_proj.base_layer.weight' is .*or not loaded"):
            call()


def test_a_forward_pass_once_the_base_is_there(folders):
    lazy = get_peft_model(unloaded(llama), config("olora"), original_weights=folders["llama"])
    loaded = llama()
    lazy.base_model.model.rotary_emb = loaded.model.rotary_emb  # its buffers are in no checkpoint
    state = {}
    for key in lazy.base_model.state_dict():
        plain = key.replace(".base_layer", "")
        state[key] = loaded.state_dict().get(plain, lazy.base_model.state_dict()[key])
    lazy.base_model.load_state_dict(state, assign=True)
    assert_near_logits(lazy, logits(loaded, token_batches()))


# -- offloaded by Accelerate -----------------------------------------------------------------------


def from_disk(folder, offload_folder):
    """The second layer stays on the disk, in the checkpoint itself."""
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    places |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=offload_folder
    ).eval()


def to_cpu(folder, offload_folder):
    return accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))


def to_disk(folder, offload_folder):
    return accelerate.disk_offload(llama(), offload_folder, torch.device("cpu"))


@pytest.mark.parametrize("offload", [from_disk, to_cpu, to_disk], ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", [True, "olora", "pissa"])
def test_offloaded_weights(offload, method, folders, tmp_path):
    base = offload(folders["llama"], tmp_path / "offloaded")
    original = logits(base, token_batches())
    whole = from_folder(folders["llama"]) if offload is from_disk else llama()
    lazy, loaded = get_peft_model(base, config(method)), get_peft_model(whole, config(method))
    assert_same_start(lazy, loaded)
    assert_near_logits(lazy, original)
    with torch.no_grad():
        for model in (lazy, loaded):
            for layer in model.layers.values():
                layer.lora_B += 0.01
    assert_near_logits(lazy, logits(loaded, token_batches()), 1e-4)
    for ours, theirs in zip(lazy.init_report().layers, loaded.init_report().layers, strict=True):
        assert ours.captured_energy == pytest.approx(theirs.captured_energy, rel=1e-5)
    lazy.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(offload(folders["llama"], tmp_path / "again"), tmp_path)
    assert_same_logits(again, lazy)
    with pytest.raises(RuntimeError, match="offloaded"):
        again.merge_adapter()
    assert_near_logits(lazy.unload(), original)


def test_statistics_of_an_offloaded_model(folders, tmp_path):
    base = from_disk(folders["llama"], tmp_path)
    lazy = get_peft_model(base, config("corda"), calibration=token_batches())
    loaded = get_peft_model(llama(), config("corda"), calibration=token_batches())
    for name, layer in lazy.layers.items():
        expected = loaded.layers[name].initial_product()
        assert (layer.initial_product() - expected).norm() <= 1e-5 * expected.norm()


def test_a_checkpoint_beside_offloaded_weights(folders, tmp_path):
    base = from_disk(folders["llama"], tmp_path)
    with pytest.raises(ValueError, match="no target is quantized or unloaded.*leave it out"):
        get_peft_model(base, config(), original_weights=folders["llama"])


def test_accelerates_hooks_come_off():
    base = accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))
    lazy = get_peft_model(base, config("olora"))
    accelerate.hooks.remove_hook_from_submodules(lazy)
    assert not any(parameter.is_meta for parameter in lazy.parameters())
    assert_near_logits(lazy, logits(llama(), token_batches()))


def test_a_hook_around_what_is_adapted():
    """It knows its weights by names that an adapter changes; around what is not adapted, it may."""
    base = accelerate.cpu_offload(
        llama(), execution_device=torch.device("cpu"), preload_module_classes=["LlamaMLP"]
    )
    expected = logits(base, token_batches())
    with pytest.raises(ValueError, match="'model.layers.0.mlp.*hook on its own module"):
        get_peft_model(base, config("olora"))
    attention = config("olora", target_modules=["q_proj"])
    assert_near_logits(get_peft_model(base, attention), expected)


# -- memory ----------------------------------------------------------------------------------------

ADAPT_AND_SAVE = """
import ctypes, pathlib, sys, torch
from transformers import AutoConfig, LlamaForCausalLM
from lora_init import LoraConfig, get_peft_model

torch.set_num_threads(1)
checkpoint, folder = sys.argv[1:]

def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

for method in (True, "olora", "pissa"):
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=method)
    # What a first call loads has nothing to do with the model; its work buffers are of this size.
    small = torch.nn.Sequential(torch.nn.Linear(512, 1408))
    get_peft_model(small, settings).save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(AutoConfig.from_pretrained(checkpoint))
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    start = resident("VmRSS:")
    get_peft_model(model, settings, original_weights=checkpoint).save_pretrained(folder)
    print("rise", resident("VmHWM:") - start)
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory):
    """A synthetic Llama's, 64 MB of random weights, of which no more than a shard is ever made."""
    folder = tmp_path_factory.mktemp("large")
    settings = LlamaConfig(
        vocab_size=128, hidden_size=512, intermediate_size=1408, num_hidden_layers=5,
        num_attention_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    settings.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlamaForCausalLM(settings).state_dict().items()}
    places = {key: f"model-{key.split('.')[2:3]}.safetensors" for key in shapes}
    for shard in set(places.values()):
        made = {key: torch.randn(shapes[key]) for key, place in places.items() if place == shard}
        save_file(made, folder / shard)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.exhaustive
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's high-water mark"
)
def test_a_model_larger_than_memory(large_checkpoint, tmp_path):
    """Of all memory, pages mapped from the files included."""
    done = subprocess.run(
        [sys.executable, "-c", ADAPT_AND_SAVE, large_checkpoint, tmp_path],
        # Freed blocks go back at once: what counts is what is in use.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    size = sum(file.stat().st_size for file in large_checkpoint.glob("*.safetensors"))
    rises = [int(line.split()[1]) for line in done.stdout.splitlines() if "rise" in line]
    assert len(rises) == 3
    assert max(rises) < size / 3, rises
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * 5 * 7
