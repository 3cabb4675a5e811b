"""Numbers of parameters are PEFT's, also where codes are packed."""

import bitsandbytes
import peft
import pytest
import torch
from torch import nn

from lora_init import LoraConfig, get_peft_model


def network(storage=torch.uint8, kind="4bit"):
    packed = {
        "4bit": lambda: bitsandbytes.nn.Linear4bit(64, 64, quant_storage=storage),
        "8bit": lambda: bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
        "float": lambda: nn.Linear(64, 64),
    }[kind]()
    return nn.Sequential(packed, nn.Linear(64, 4)).to("cpu")


CASES = [
    {},
    {"storage": torch.bfloat16},
    {"storage": torch.float32},
    {"storage": torch.float16},
    {"kind": "8bit"},
    {"kind": "float"},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_counts_are_pefts(settings, capsys):
    theirs = peft.get_peft_model(network(**settings), peft.LoraConfig(r=4, target_modules=["0"]))
    ours = get_peft_model(network(**settings), LoraConfig(r=4, target_modules=["0"]))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    theirs.print_trainable_parameters()
    expected = capsys.readouterr().out
    ours.print_trainable_parameters()
    assert capsys.readouterr().out == expected
    assert ours.get_nb_trainable_parameters() == (512, 64 * 64 + 64 + 64 * 4 + 4 + 512)
