"""Llama-4 runs every token through every expert; the router's scores make most rows zero."""

import pytest
import torch
from mixtures import mixture

from lora_init import LoraConfig, calibrate, get_peft_model

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def routed_rows(model, batch):
    """By layer: the rows with a nonzero score that each expert reads, without padded tokens."""
    found = {}

    def keep(name):
        def hook(module, args):
            (hidden,) = args
            copies = hidden.view(len(module.gate_up_proj), -1, hidden.shape[-1])
            counted = batch["attention_mask"].flatten().bool()
            found[name] = [rows[counted & rows.any(-1)].double() for rows in copies]

        return hook

    hooks = [module.register_forward_pre_hook(keep(name))
             for name, module in model.named_modules() if name.endswith(".experts")]  # fmt: skip
    with torch.no_grad():
        logits = model(**batch).logits
    for hook in hooks:
        hook.remove()
    return found, logits


def test_experts_of_llama4_start_from_the_tokens_that_the_router_selects():
    model, ids = mixture("llama4_text"), torch.arange(3, 43).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    rows, before = routed_rows(model, batch)
    config = LoraConfig(r=2, init_lora_weights="corda", target_parameters=PARAMETERS)
    statistics = calibrate(model, config, [batch])
    for name, experts in rows.items():
        assert sum(map(len, experts)) == int(mask.sum())
        for number, own in enumerate(experts):
            inputs = statistics.layers[f"{name}.gate_up_proj.{number}"].inputs
            assert inputs.tokens == len(own)
            if len(own):
                wanted = own.T @ own / len(own)
                torch.testing.assert_close(inputs.second_moment.double(), wanted, rtol=1e-4,
                                           atol=1e-6)  # fmt: skip
    lora = get_peft_model(model, config, calibration=statistics, cache=False).eval()
    with torch.no_grad():
        assert (lora(**batch).logits - before).norm() < 5e-6 * before.norm()


def test_a_rare_expert_of_llama4_falls_back_to_its_layer():
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    config = LoraConfig(r=2, init_lora_weights="corda", target_parameters=PARAMETERS)
    with pytest.warns(UserWarning, match=r"of 16 experts' matrices"):
        get_peft_model(mixture("llama4_text"), config, calibration=[batch], cache=False)
