"""Adapter files of fused experts and of routers: PEFT's layout, read and written."""

import copy
import json
import warnings

import peft
import pytest
import torch
from mixtures import mixture
from models import token_batches
from peft import PeftModel

from lora_init import LoraConfig, LoraModel, get_peft_model
from lora_init.cli.parser import main

pytestmark = pytest.mark.sampled(3)

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
KINDS = ["mixtral", "gpt_oss", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v3",
         "glm4_moe", "jamba", "granitemoehybrid"]  # fmt: skip
SUBSETS = [BOTH, ["experts.gate_up_proj"], ["experts.down_proj"]]


def fused(kind):
    """The parameters of a model's experts. Their first matrix may have no gate."""
    names = [name for name, _ in mixture(kind).named_parameters()]
    return [entry for entry in BOTH if any(name.endswith(f".{entry}") for name in names)]


@torch.no_grad()
def moved(model):
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def output(model):
    (batch,) = token_batches(1, padded=False)
    return model(input_ids=batch["input_ids"]).logits


def gap(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


FILES = [
    pytest.param(kind, method, names, rslora,
                 marks=() if ((kind, method) in {("mixtral", "pissa"), ("gpt_oss", "kaiming")}
                 and names == BOTH and not rslora) or ((kind, method, rslora) ==
                 ("qwen3_moe", "pissa", True) and names == SUBSETS[2])
                 else pytest.mark.exhaustive)
    for kind in KINDS
    for method in ("kaiming", "pissa", "lora_xs")
    for names in SUBSETS
    for rslora in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("kind", "method", "names", "rslora"), FILES)
def test_peft_loads_the_file_and_so_do_we(kind, method, names, rslora, tmp_path):
    names = [name for name in names if name in fused(kind)]
    if not names:
        pytest.skip("no such parameter")
    base = mixture(kind)
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=method, use_rslora=rslora,
                        target_modules=["o_proj"], target_parameters=names)  # fmt: skip
    model = moved(get_peft_model(copy.deepcopy(base), config, cache=False))
    wanted = output(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_parameters"] == names
    assert "experts" not in written
    assert written["r"] == (6 if method == "pissa" else 3)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert gap(output(theirs), wanted) < 2e-6
    ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(ours.eval()), wanted)


ROUTERS = [
    pytest.param(kind, "kaiming" if kind == "mixtral" else "pissa",
                 marks=() if kind in ("mixtral", "gpt_oss") else pytest.mark.exhaustive)
    for kind in [*KINDS, "llama4_text"]
]  # fmt: skip


@pytest.mark.parametrize(("kind", "method"), ROUTERS)
def test_files_of_routers_mean_the_same_in_peft(kind, method, tmp_path):
    base = mixture(kind)
    has_router = any(name.endswith("router.weight") for name, _ in base.named_parameters())
    name = "router" if has_router else "gate"
    if not any(n.endswith(f"{name}.weight") for n, _ in base.named_parameters()):
        pytest.skip("no router")
    settings = {"r": 2, "target_modules": ["o_proj"], "rank_pattern": {f"{name}.weight": 1},
                "target_parameters": [f"{name}.weight"]}  # fmt: skip
    model = get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=method, **settings))
    wanted = output(moved(model))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_parameters"] == [f"{name}.weight"]
    assert gap(output(LoraModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()), wanted) == 0
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert gap(output(theirs), wanted) < 2e-6
    config = peft.LoraConfig(**settings, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert gap(output(ours), output(theirs)) < 2e-6


def test_peft_finds_the_rank_of_a_dense_layer_that_a_file_names_as_a_parameter(tmp_path):
    base, name = mixture("deepseek_v3"), "model.layers.0.mlp.down_proj"
    config = LoraConfig(r=2, target_modules=["o_proj", name], rank_pattern={"mlp.down_proj": 3})
    model = moved(get_peft_model(copy.deepcopy(base), config))
    model.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert gap(output(theirs), output(model)) < 2e-6


@pytest.mark.parametrize("method", ["kaiming", "pissa"])
def test_llama4_files_have_the_transposed_factors_that_peft_reads(method, tmp_path):
    """PEFT reads every stack that declares no layout as (experts, out, in)."""
    base = mixture("llama4_text")
    config = LoraConfig(r=3, init_lora_weights=method, target_parameters=BOTH)
    model = moved(get_peft_model(copy.deepcopy(base), config, cache=False))
    wanted = output(model)
    model.save_pretrained(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert gap(output(theirs), wanted) < 2e-6
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert gap(output(LoraModel.from_pretrained(copy.deepcopy(base), folder)), wanted) < 2e-6


PEFT_FILES = [
    pytest.param(kind, names, marks=() if kind == "mixtral" else pytest.mark.exhaustive)
    for kind in KINDS
    for names in SUBSETS[::2]
]


@pytest.mark.parametrize(("kind", "names"), PEFT_FILES)
def test_a_file_of_peft_means_the_same_here(kind, names, tmp_path):
    names = [name for name in names if name in fused(kind)]
    base = mixture(kind)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["o_proj"], target_parameters=names,
                             init_lora_weights=False)  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert gap(output(ours.eval()), output(theirs)) < 2e-6


@pytest.mark.parametrize("method", ["loftq", "pissa"])
def test_a_file_continues_the_training(method, tmp_path):
    base = mixture("mixtral")
    config = LoraConfig(r=3, init_lora_weights=method, target_parameters=BOTH)
    model = moved(get_peft_model(copy.deepcopy(base), config, cache=False))
    model.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(again.eval()), output(model))
    for one, other in zip(model.layers.values(), again.layers.values(), strict=True):
        assert torch.equal(one.lora_A, other.lora_A)
        assert torch.equal(one.stored_weight, other.stored_weight)
        if method == "pissa":  # the file of a replaced base holds the recipe of the base instead
            assert torch.equal(one.initial_lora_B, other.initial_lora_B)


OLD_NAMES = [
    ("mixtral", "all-linear"),
    ("mixtral", ["q_proj", "w1", "w2", "w3"]),
    ("olmoe", "all-linear"),
    ("olmoe", ["gate_proj", "up_proj"]),
    ("glm4_moe", "all-linear"),
]


@pytest.mark.parametrize("method", ["kaiming", "pissa"])
@pytest.mark.parametrize(("kind", "names"), OLD_NAMES)
def test_a_doubled_rank_is_saved_and_loaded(kind, names, method, tmp_path):
    """Selected by old names, gate_up_proj has twice the rank and alpha."""
    base = mixture(kind)
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=method, target_modules=names,
                        alpha_pattern={"experts.gate_up_proj": 5})  # fmt: skip
    model = moved(get_peft_model(copy.deepcopy(base), config, cache=False))
    wanted = {name: (layer.rank, layer.scaling) for name, layer in model.layers.items()}
    assert (6, 10 / 6) in wanted.values()
    for number in range(2):
        folder = tmp_path / str(number)
        (model if number == 0 else again).save_pretrained(folder)
        again = LoraModel.from_pretrained(copy.deepcopy(base), folder).eval()
        assert {n: (layer.rank, layer.scaling) for n, layer in again.layers.items()} == wanted
        assert torch.equal(output(again), output(model))
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        assert gap(output(theirs), output(model)) < 5e-6
    restarted = get_peft_model(copy.deepcopy(base), again.peft_config, cache=False)
    assert {n: (layer.rank, layer.scaling) for n, layer in restarted.layers.items()} == wanted


def test_the_commands_treat_each_expert_by_itself(tmp_path, capsys):
    base = mixture("mixtral")
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["o_proj"],
                        target_parameters=[*BOTH, "gate.weight"])  # fmt: skip
    model = moved(get_peft_model(copy.deepcopy(base), config))
    model.save_pretrained(tmp_path / "in")
    base.save_pretrained(tmp_path / "base")

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        caught = capsys.readouterr()
        return json.loads(caught.out) if code == 0 else caught.err

    rows = run("inspect", tmp_path / "in", "--against", tmp_path / "base", "--json")
    assert "holds the factors of all experts" in rows["loaders"]["vLLM"]
    assert {row["name"] for row in rows["layers"]} == set(model.layers)
    products, errors = {}, {}
    for row in rows["layers"]:
        layer = model.layers[row["name"]]
        products[row["name"]] = product = layer.delta_weight().double().detach()
        values = torch.linalg.svdvals(product)[..., :3]
        errors[row["name"]] = float(values[..., 2:].norm() / values.norm())
        found = torch.tensor(row["singular_values"], dtype=torch.float64)
        torch.testing.assert_close(found, values.view(-1, 3).square().mean(0).sqrt())
        assert row["relative_norm"] == pytest.approx(
            float(product.norm() / layer.stored_weight.norm())
        )
        assert (row["rank"], row["shape"]) == (3, list(product.shape[-2:]))
    found = run("convert", tmp_path / "in", tmp_path / "out", "--rank", 2, "--json")
    assert {row["name"]: row["error"] for row in found["layers"]} == pytest.approx(errors)
    again = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    for name, layer in again.layers.items():
        gap_of_layer = gap(layer.delta_weight().double(), products[name])
        assert gap_of_layer == pytest.approx(errors[name], rel=1e-4)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    assert gap(output(theirs), output(again.eval())) < 2e-6
    for words in (["--portable"], ["--format", "diffusers"]):
        message = run("convert", tmp_path / "in", tmp_path / "other", *words)
        assert "holds the factors of all experts" in message


def test_an_edited_selection_of_experts_is_refused(tmp_path):
    base = mixture("mixtral")
    config = LoraConfig(r=3, target_modules=["o_proj"], target_parameters=BOTH)
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"target_parameters": BOTH[:1]}))
    with pytest.raises(ValueError, match="contradict|does not have|lacks"):
        LoraModel.from_pretrained(base, tmp_path)


def test_a_portable_file_of_experts_is_refused(tmp_path):
    model = get_peft_model(mixture("mixtral"), LoraConfig(target_parameters=BOTH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="portable=True is not supported with the Experts"):
            model.save_pretrained(tmp_path, portable=True)
