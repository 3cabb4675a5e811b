"""What trains an adapter: plain PyTorch, Accelerate, transformers' Trainer, torch.compile,
checkpointed activations, autocast; and what copies and stores a model in between.

Every test goes over the places where the initial product of a subtracting method can be: an edited
base, the forward pass, nowhere; a tied base and DoRA included. Several processes, shards and
offloading are in `test_distributed_training`.
"""

import copy
import inspect
import io
import pickle
from itertools import product

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from models import VOCABULARY, bert, gpt2, llama, token_batches
from products import chosen, every_value
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForQuestionAnswering,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lora_init import LoraConfig, LoraModel, get_peft_model

pytestmark = pytest.mark.sampled(3)

LLAMA = ["q_proj", "k_proj", "up_proj"]
BERT = ["query", "dense"]
CASES = {
    "edited": (llama, "pissa", LLAMA, {}),
    "edited tied": (gpt2, "pissa", ["c_attn", "c_fc"], {}),
    "kept tied": (gpt2, True, ["c_attn", "wte"], {"lora_dropout": 0.1}),
    "in the forward pass": (lambda: llama().bfloat16(), "pissa", LLAMA, {}),
    "dora": (bert, "pissa", BERT, {"use_dora": True}),
    "dora in the forward pass": (lambda: bert().bfloat16(), "olora", BERT, {"use_dora": True}),
    "whole modules": (bert, True, BERT, {"modules_to_save": ["classifier"], "bias": "lora_only"}),
}
every_case = pytest.mark.parametrize("case", CASES)


def adapted(case, **settings):
    make, method, targets, more = CASES[case]
    config = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=method, target_modules=targets, **more, **settings
    )
    return get_peft_model(make(), config)


def labeled(batches):
    """Each batch with the labels of either task: of its tokens, or one a row."""
    return {
        "tokens": [b | {"labels": b["input_ids"].masked_fill(b["input_ids"] == 0, -100)}
                   for b in batches],
        "rows": [b | {"labels": b["input_ids"][:, 0] % 3} for b in batches],
    }  # fmt: skip


def batches_for(model, **options):
    kind = "rows" if hasattr(model, "classifier") else "tokens"
    return labeled(token_batches(**options))[kind]


def examples_for(model, count, **options):
    """Single rows, each with a column that no model takes."""
    rows = batches_for(model, count=count, size=1, padded=False, **options)
    return [{k: v[0] for k, v in row.items()} | {"note": 1.0} for row in rows]


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimize(model, batches, rate=3e-3, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=rate)
    losses = []
    model.train()
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, other):
    first, second = model.state_dict(), other.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- plain PyTorch ---------------------------------------------------------------------------------


@every_case
def test_only_the_adapter_learns(case):
    model = adapted(case)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    losses = optimize(model, batches_for(model, count=1) * 12)
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3]), losses
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name
        own = "lora_" in name or "trained_module" in name or name.endswith("base_layer.bias")
        assert own or not parameter.requires_grad, name
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


# -- Accelerate ------------------------------------------------------------------------------------


def accelerator(**settings):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **settings)


@every_case
def test_accelerate_resumes_to_the_last_bit(case, tmp_path):
    def run(batches, folder, *, load=False, save_after=None):
        one = accelerator()
        model = adapted(case)
        optimizer = torch.optim.AdamW(trainable(model), lr=3e-3)
        # The loader yields batches that are whole already.
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        model, optimizer, loader = one.prepare(model, optimizer, loader)
        losses = []
        model.train()
        for step, batch in enumerate(loader, start=1):
            if load and step == 1:  # a loader that starts draws a number of its own
                one.load_state(folder)
            loss = model(**batch).loss
            one.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step == save_after:
                one.save_state(folder)
        return losses, one.unwrap_model(model)

    batches = batches_for(adapted(case), count=6)
    expected, straight = run(batches, tmp_path, save_after=3)
    saved = load_file(tmp_path / "model.safetensors")
    assert not any("base_layer.weight" in name for name in saved)
    torch.manual_seed(99)  # the checkpoint brings the state of the dropout masks
    losses, resumed = run(batches[3:], tmp_path, load=True)
    assert losses == expected[3:]
    assert_same_state(resumed, straight)


# -- transformers' Trainer -------------------------------------------------------------------------


def trainer(model, folder, examples, **settings):
    defaults = dict(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=3e-3,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        per_device_eval_batch_size=4, lr_scheduler_type="constant",
    )  # fmt: skip
    arguments = TrainingArguments(**defaults | settings)
    made = Trainer(model, arguments, train_dataset=examples, eval_dataset=examples[:8])
    for callback in list(made.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            made.remove_callback(callback)
    return made


def logged(made, key):
    return {entry["step"]: entry[key] for entry in made.state.log_history if key in entry}


@pytest.mark.parametrize("case", chosen(CASES, *list(CASES)[::3]))
def test_trainer_trains_evaluates_and_resumes(case, tmp_path):
    model = adapted(case)
    examples = examples_for(model, 16)
    steps = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    straight = trainer(model, tmp_path, examples, **steps)
    straight.train()
    losses, evaluated = logged(straight, "loss"), logged(straight, "eval_loss")
    assert len(losses) == 6
    assert len(evaluated) == 2
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()

    resumed = trainer(adapted(case), tmp_path, examples, **steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(resumed, "loss") == losses  # the first three come with the checkpoint
    assert logged(resumed, "eval_loss") == evaluated
    assert_same_state(resumed.model, model)


@pytest.mark.parametrize("case", ["edited", "kept tied", "dora in the forward pass"])
def test_trainer_loads_the_best_model(case, tmp_path):
    model = adapted(case)
    made = trainer(
        model, tmp_path, examples_for(model, 16), max_steps=4, save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        greater_is_better=True,  # of the loss: the first checkpoint is the "best"
    )  # fmt: skip
    made.train()
    evaluated = logged(made, "eval_loss")
    assert evaluated[2] > evaluated[4]
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    assert made.evaluate()["eval_loss"] == evaluated[2]


def question_answering():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=80, max_position_embeddings=64,
    )  # fmt: skip
    return BertForQuestionAnswering(config)


@pytest.mark.parametrize(
    ("make", "smoothing"),
    every_value(
        [(question_answering, 0.0), *product([llama, gpt2, bert], [0.0, 0.2])],
        2,
    ),
)
def test_trainer_treats_it_as_the_base_model(make, smoothing, tmp_path):
    """Columns, labels, shifted labels and averaging are found in a model's class and signature."""
    base = make()
    examples = examples_for(base, 8)
    if make is question_answering:
        spans = {"start_positions": torch.tensor(2), "end_positions": torch.tensor(5)}
        examples = [{k: v for k, v in row.items() if k != "labels"} | spans for row in examples]
    settings = {"label_smoothing_factor": smoothing}
    before = trainer(base, tmp_path, examples, **settings)
    expected = before.evaluate()
    target = "c_attn" if make is gpt2 else "k_proj" if make is llama else "key"
    model = get_peft_model(base, LoraConfig(r=4, target_modules=[target]))
    after = trainer(model, tmp_path, examples, **settings)
    assert after.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
    for attribute in (
        "label_names", "can_return_loss", "model_accepts_loss_kwargs", "_loss_shifts_labels",
    ):  # fmt: skip
        assert getattr(after, attribute) == getattr(before, attribute), attribute
    assert sorted(after._signature_columns) == sorted(before._signature_columns)


class Plain(nn.Module):
    """No transformers model: a loss, and no **kwargs that could swallow a surplus argument."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.table(input_ids).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def test_trainer_with_accumulation_and_a_model_of_ones_own(tmp_path):
    """Trainer passes `num_items_in_batch` to whatever has **kwargs in its signature."""
    model = get_peft_model(Plain(), LoraConfig(r=2, target_modules=["head", "table"]))
    examples = labeled(token_batches(count=16, size=1, padded=False))["rows"]
    examples = [{k: v[0] for k, v in row.items()} for row in examples]  # a mask it does not take
    made = trainer(model, tmp_path, examples, gradient_accumulation_steps=2, save_strategy="no")
    assert not made.model_accepts_loss_kwargs
    made.train()
    assert set(made.evaluate()) >= {"eval_loss"}


class Steps(TrainerCallback):
    def __init__(self):
        self.seen = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.seen += 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_trainer_with_checkpointed_activations_and_autocast(reentrant, tmp_path):
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model = adapted("edited")
    counter = Steps()
    made = trainer(
        model, tmp_path, examples_for(model, 16), gradient_checkpointing=True, bf16=True,
        save_strategy="no", **settings,
    )  # fmt: skip
    made.add_callback(counter)
    before = state(model)
    made.train()
    losses = list(logged(made, "loss").values())
    assert counter.seen == 6
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in after if ".lora_" in name)


# -- a 4-bit base ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)
    return folder


def quantized(folder, **settings):
    # On a CPU, bitsandbytes' four-bit kernel is for rows of whole blocks.
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    return get_peft_model(
        base, LoraConfig(r=4, init_lora_weights="pissa", target_modules=LLAMA, **settings)
    )


@pytest.mark.parametrize("use_dora", [False, True])
def test_trainer_on_a_four_bit_base(four_bits, use_dora, tmp_path):
    model = quantized(four_bits, use_dora=use_dora)
    assert model.is_quantized
    examples = examples_for(model, 16)
    steps = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    made = trainer(model, tmp_path, examples, **steps)
    made.train()
    losses = logged(made, "loss")
    assert min(losses[5], losses[6]) < losses[1]
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert {name for name in saved if "lora_" not in name} == {"_extra_state"}
    resumed = trainer(quantized(four_bits, use_dora=use_dora), tmp_path, examples, **steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(resumed, "loss") == losses
    assert_same_state(resumed.model, model)


def test_trainer_refuses_a_four_bit_base_without_an_adapter(four_bits, tmp_path):
    model = quantized(four_bits)
    examples = examples_for(model, 4)
    plain = model.unload()
    for unadapted in (model, plain):
        with pytest.raises(ValueError, match="purely quantized"):
            trainer(unadapted, tmp_path, examples)


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ["edited", "kept tied", "in the forward pass", "dora"])
def test_compiled_is_eager(case):
    """One graph, the same output and gradients, and another graph when the adapter is switched."""
    torch._dynamo.reset()
    model = perturbed(adapted(case)).eval()  # dropout's masks are drawn in another order
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            del module[1:]  # compiling takes seconds a layer
    batch = token_batches(count=1)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tolerance = 1e-5 if next(model.parameters()).dtype == torch.float32 else 1e-2

    def outputs(one):
        with torch.no_grad():
            return [one(**batch).logits]

    def outputs_and_gradients(one):
        model.zero_grad()
        logits = one(**batch).logits
        logits.float().square().mean().backward()
        return [logits.detach(), *(parameter.grad for parameter in trainable(model))]

    def compare(run):
        results = run(model), run(compiled)
        for eager, other in zip(*results, strict=True):
            scale = max(float(eager.abs().max()), 1e-3)
            torch.testing.assert_close(other, eager, rtol=0, atol=tolerance * scale)
        return results[1][0]

    on = compare(outputs_and_gradients)
    with model.disable_adapter():
        off = compare(outputs)
    assert not torch.allclose(on, off, atol=1e-2)
    assert torch.equal(compare(outputs_and_gradients), on)
    if case == "edited":
        model.merge_adapter()
        torch.testing.assert_close(compare(outputs), on, rtol=0, atol=1e-5 * float(on.abs().max()))
        model.unmerge_adapter()
        assert torch.equal(compare(outputs_and_gradients), on)
        assert list(compiled.state_dict()) == [f"_orig_mod.{key}" for key in model.state_dict()]


def perturbed(model):
    """Every trainable tensor away from where it started."""
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


# -- checkpointed activations, autocast ------------------------------------------------------------


def checkpointed_by_torch(model):
    blocks = {type(module) for module in model.modules() if type(module).__name__ == "BertLayer"}
    apply_activation_checkpointing(model, check_fn=lambda module: type(module) in blocks)


def compiled_by_blocks(model):
    layers = model.bert.encoder.layer
    for index, block in enumerate(layers):
        layers[index] = torch.compile(block, backend="eager")


@pytest.mark.parametrize("wrap", [checkpointed_by_torch, compiled_by_blocks])
def test_wrappers_inside_the_model(wrap):
    """They put parts into the modules' names; one leaves them out of the state dict's."""

    def build():
        config = LoraConfig(
            r=4, init_lora_weights="olora", target_modules=BERT, bias="all", use_dora=True
        )
        return get_peft_model(bert(), config)

    model, plain = build(), build()
    keys = list(plain.state_dict())
    wrap(model)
    names = [key.replace("_orig_mod.", "") for key in model.state_dict()]
    assert sorted(names) == sorted(keys)
    assert any(name.endswith("LayerNorm.bias") for name in names)
    perturbed(model)
    state_of = {k.replace("_orig_mod.", ""): v.clone() for k, v in model.state_dict().items()}
    plain.load_state_dict(state_of)
    other = perturbed(build())
    for layer in other.layers.values():  # another start, which the base has to follow
        layer.initial_lora_A.mul_(1.5)
    moved = {
        key: other.state_dict()[key.replace("_orig_mod.", "")].clone() for key in model.state_dict()
    }
    model.load_state_dict(moved)
    for name, layer in model.layers.items():
        assert torch.equal(layer.initial_lora_A, other.layers[name].initial_lora_A)
        original = layer.original_weight() - plain.layers[name].original_weight()
        assert original.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("case", "reentrant", "enabled"),
    every_value(
        product(
            ["edited", "kept tied", "in the forward pass", "dora"],
            [False, True],
            ["before injection", "after"],
        ),
        3,
    ),
)
def test_checkpointed_activations(case, reentrant, enabled, recwarn):
    make, method, targets, more = CASES[case]
    config = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=method, target_modules=targets,
        use_dora=more.get("use_dora", False),
    )  # fmt: skip
    found = []
    for checkpointed in (False, True):
        base = make()
        arguments = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        if checkpointed and enabled == "before injection":
            base.gradient_checkpointing_enable(**arguments)
        model = get_peft_model(base, config)
        if checkpointed and enabled == "after":
            model.gradient_checkpointing_enable(**arguments)
        assert model.is_gradient_checkpointing == checkpointed
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        found.append(perturbed(model))
    found[0].load_state_dict(found[1].state_dict())
    batch = batches_for(model, count=1)[0]
    for model in found:
        model(**batch).loss.backward()
    pairs = list(zip(trainable(found[0]), trainable(found[1]), strict=True))
    assert pairs
    for plain, checkpointed in pairs:
        assert checkpointed.grad is not None
        torch.testing.assert_close(checkpointed.grad, plain.grad)
    assert not [w for w in recwarn if "requires_grad" in str(w.message)]


@every_case
def test_autocast(case):
    model = adapted(case)
    batches = batches_for(model, count=1) * 12
    norms = []
    for layer in model.layers.values():
        layer.register_forward_pre_hook(
            lambda layer, _: norms.append(layer.adapted_norms()) if layer.use_dora else None
        )
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-3)
    losses = []
    model.train()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3]), losses
    assert bool(norms) == CASES[case][3].get("use_dora", False)
    assert {norm.dtype for norm in norms} <= {torch.float32}
    if norms:
        layer = next(iter(model.layers.values()))
        plain = layer.adapted_norms()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.adapted_norms(), plain)


def test_autocast_starts_where_the_base_is():
    """A gain of 1 is 1 there too; what autocast rounds is the base's own product."""
    model = adapted("dora").eval()
    batch = batches_for(model, count=1)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for layer in model.layers.values():
            torch.testing.assert_close(layer.gain(), torch.ones_like(layer.gain()))
        adapted_logits = model(**batch).logits
        with model.disable_adapter():
            original = model(**batch).logits
    torch.testing.assert_close(adapted_logits, original, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_hands_back_the_model(precision):
    one = accelerator(mixed_precision=precision)
    model = adapted("edited")
    prepared = one.prepare(model)
    batch = batches_for(model, count=1)[0]
    prepared(**batch).loss.backward()
    assert one.unwrap_model(prepared, keep_fp32_wrapper=False) is model
    assert one.get_state_dict(prepared).keys() == model.state_dict().keys()


# -- copies and pickles ----------------------------------------------------------------------------


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("case", "copied"),
    every_value(product(CASES, [copy.deepcopy, through_pickle, through_a_file]), 2),
)
def test_a_copy_is_a_model_of_its_own(case, copied):
    model = adapted(case)
    batches = batches_for(model, count=4)
    optimize(model, batches[:2])
    model.eval()
    twin = copied(model)
    assert type(twin) is type(model)
    assert isinstance(twin, LoraModel)
    assert twin.plan == model.plan
    assert twin.peft_config == model.peft_config
    before = state(model)
    with torch.no_grad():
        assert torch.equal(twin(**batches[0]).logits, model(**batches[0]).logits)
        with twin.disable_adapter(), model.disable_adapter():
            assert torch.equal(twin(**batches[0]).logits, model(**batches[0]).logits)
    optimize(twin, batches[2:])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert twin.state_dict().keys() == before.keys()
    twin.load_state_dict(before)  # the hooks of its own
    assert_same_state(twin, model)
    restored, original = twin.unload().state_dict(), model.unload().state_dict()
    assert all(torch.equal(restored[name], value) for name, value in original.items())


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_a_file])
def test_a_copy_of_a_four_bit_model(four_bits, copied):
    model = quantized(four_bits)
    batch = batches_for(model, count=1)[0]
    twin = copied(model)
    for one in (model, twin):
        one.train()
        one(**batch).loss.backward()
    for ours, other in zip(trainable(model), trainable(twin), strict=True):
        assert torch.equal(ours.grad, other.grad)
    assert_same_state(twin, model)


# -- the class and its signature -------------------------------------------------------------------


def test_the_signature_is_the_base_models():
    model, other = adapted("edited"), adapted("edited tied")
    assert isinstance(model, LoraModel)
    assert type(model) is type(adapted("edited"))
    assert type(model) is not type(other)
    for one in (model, other):
        base = one.get_base_model()
        assert inspect.signature(one.forward) == inspect.signature(base.forward)
        assert inspect.signature(type(one).forward) == inspect.signature(type(base).forward)
    assert repr(model).startswith("LoraModel[LlamaForCausalLM](\n  (base_model): LlamaForCausalLM(")


def test_loading_through_any_of_the_classes(tmp_path):
    """`from_pretrained` of one model's class serves another base too."""
    model = adapted("dora")
    model.save_pretrained(tmp_path)
    for cls in (LoraModel, type(model), type(adapted("edited"))):
        assert type(cls.from_pretrained(bert(), tmp_path)) is type(model)


def test_a_subclass_keeps_its_own():
    class Mine(LoraModel):
        def twice(self, **batch):
            return 2 * self(**batch).logits

    model = adapted("edited")
    mine = Mine(
        model.base_model, model.peft_config, model.plan, model._injection, model._report, {}, {}
    )
    assert isinstance(mine, Mine)
    batch = token_batches(count=1)[0]
    assert torch.equal(mine.twice(**batch), 2 * model(**batch).logits)


def test_a_base_without_a_signature():
    """A scripted module has none that Python can read; it is served as it is."""

    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.jit.trace(nn.Linear(4, 4), torch.ones(1, 4))
            self.head = nn.Linear(4, 4)

        forward = property(lambda self: lambda x: self.head(self.inner(x)))

    model = get_peft_model(Scripted(), LoraConfig(r=2, target_modules=["head"]))
    assert type(model) is LoraModel
    assert model(torch.ones(1, 4)).shape == (1, 4)
    assert type(copy.deepcopy(model)) is LoraModel
