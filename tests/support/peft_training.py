"""A tiny PEFT model and a trainer for it, which train in a second."""

import peft
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


class Rows(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = torch.randint(3, 15, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def peft_model(folder, **settings):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


def trainer_of(model, output, callback=None, **settings):
    arguments = TrainingArguments(
        str(output), per_device_train_batch_size=2, learning_rate=1e-2, report_to="none",
        use_cpu=True, disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False,
        **{"max_steps": 4, "save_strategy": "no", **settings},
    )  # fmt: skip
    callbacks = [] if callback is None else [callback]
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 15)[None]).logits


def factors(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()
            if "lora_" in name}  # fmt: skip
