"""`LoraInitCallback` in TRL's GRPOTrainer, and the weights that a sampler gets from it."""

import copy

import peft
import pytest
import torch
from measures import assert_gap, relative_gap
from peft_training import logits
from substitutes import random_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_init import initialize_peft_model
from lora_init.integrations.transformers import LoraInitCallback

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_llama(tmp_path_factory.mktemp("llama"), 32)


def base_model(folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # so that logits depend on the adapted weights
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim == 2 else 1)
    return model.to(dtype)


def configuration():
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def different_tokens(completions, **_):
    return [float(len(set(text))) for text in completions]


def trainer_of(model, folder, output, callback, **settings):
    arguments = trl.GRPOConfig(
        str(output), max_steps=2, per_device_train_batch_size=2, num_generations=2, beta=0.1,
        max_completion_length=6, learning_rate=1e-2, use_cpu=True, bf16=False, report_to="none",
        disable_tqdm=True, save_strategy="no", logging_steps=1, gradient_checkpointing=False,
    )  # fmt: skip
    return trl.GRPOTrainer(
        model, reward_funcs=different_tokens, args=arguments, callbacks=[callback],
        train_dataset=datasets.Dataset.from_list([{"prompt": f"{n} + 1 = "} for n in range(8)]),
        processing_class=AutoTokenizer.from_pretrained(folder), **settings,
    )  # fmt: skip


@pytest.mark.slow
def test_grpo_starts_at_its_reference_and_its_adapter_gives_a_sampler_the_same_logits(
    folder, tmp_path
):
    callback = LoraInitCallback("pissa")
    trainer = trainer_of(
        base_model(folder), folder, tmp_path, callback, peft_config=configuration()
    )
    trainer.train()
    divergence = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergence[0] == pytest.approx(0, abs=1e-6)
    assert divergence[1] > 0
    trainer.save_model(tmp_path / "adapter")
    sampler = peft.PeftModel.from_pretrained(base_model(folder), tmp_path / "adapter")
    trained = logits(trainer.model)
    assert relative_gap(trained, logits(base_model(folder))) > 1e-3
    assert_gap(logits(sampler), trained, 1e-5)


def changed(model):
    """Move the factors, as a training does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["pissa", "orthogonal"])
def test_merged_weights_give_a_sampler_the_same_logits(method, dtype, folder):
    """TRL 1.16.0 merges, sends each weight by the base's name, and unmerges (vllm_generation)."""
    model = peft.get_peft_model(base_model(folder, dtype), configuration())
    initialize_peft_model(model, method)
    expected = logits(changed(model)).float()
    model.merge_adapter()
    sent = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.detach().clone()
        for name, value in model.named_parameters()
        if model.prefix not in name
    }
    model.unmerge_adapter()
    sampler = base_model(folder, dtype)
    start = logits(sampler).float()
    sampler.load_state_dict(sent, strict=True)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert relative_gap(expected, start) > 2 * tolerance
    assert_gap(logits(sampler).float(), expected, tolerance)
    assert_gap(logits(model).float(), expected, tolerance)


def test_a_state_dict_of_the_adapter_gives_a_sampler_the_same_logits(folder):
    model = peft.get_peft_model(base_model(folder), configuration())
    initialize_peft_model(model, "pissa")
    expected = logits(changed(model))
    sent = peft.get_peft_model_state_dict(model)
    rank = next(value.shape[0] for name, value in sent.items() if "lora_A" in name)
    settings = copy.deepcopy(configuration())
    settings.r, settings.lora_alpha = rank, settings.lora_alpha * rank // settings.r
    sampler = peft.get_peft_model(base_model(folder), settings)
    peft.set_peft_model_state_dict(sampler, sent)
    assert rank == 8
    assert_gap(logits(sampler), expected, 1e-5)


def test_a_trainer_without_tensors_asks_for_batches(folder, tmp_path):
    settings = {"peft_config": configuration()}
    trainer = trainer_of(base_model(folder), folder, tmp_path, LoraInitCallback("eva"), **settings)
    with pytest.raises(ValueError, match="is a list. Pass batches for the model"):
        trainer.train()
    ids = torch.arange(3, 15)[None]
    callback = LoraInitCallback("eva", calibration=[{"input_ids": ids}])
    trainer_of(base_model(folder), folder, tmp_path, callback, **settings).train()
    assert callback.report.calibration_tokens == 12
