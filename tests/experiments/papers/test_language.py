"""Losses by block, against a plain float64 computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_llama import some_blocks, tiny_llama

from experiments.papers.language import block_losses, paired_error, perplexity, spread


@pytest.mark.parametrize("batch_size", [1, 4])
def test_losses_are_those_of_the_next_tokens(batch_size):
    model, blocks = tiny_llama().train(), some_blocks()
    found = block_losses(model, blocks, batch_size)
    assert model.training
    logits = model(input_ids=blocks).logits.detach().double().numpy()
    for row, block, loss in zip(logits, blocks.tolist(), found.tolist(), strict=True):
        chances = np.exp(row) / np.exp(row).sum(1, keepdims=True)
        expected = -np.mean([math.log(chances[i, block[i + 1]]) for i in range(len(block) - 1)])
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_uniform_guess_has_the_perplexity_of_its_vocabulary():
    assert perplexity(torch.full((3,), math.log(40.0))) == pytest.approx(40)


def test_spread_takes_blocks_at_equal_distances():
    blocks = torch.arange(10)[:, None]
    assert spread(blocks, 3)[:, 0].tolist() == [0, 3, 6]
    assert spread(blocks, 20) is blocks


def test_the_paired_error_knows_no_difficulty_of_the_text():
    hard = torch.tensor([1.0, 5.0, 3.0, 9.0]).double()
    difference = torch.tensor([0.1, 0.3, 0.2, 0.2]).double()
    expected = np.std(difference.numpy(), ddof=1) / 2
    assert paired_error(hard + difference, hard) == pytest.approx(expected)
    assert paired_error(hard[:1], hard[:1]) == math.inf
