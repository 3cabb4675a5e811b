"""The rows of each expert, compared with a loop over pairs of a token and an expert."""

import pytest
import torch
from expert_modules import CLASSES, EXPERTS, HIDDEN, ROUTED, WIDTH, experts

from lora_init.layers.routed_product import activated
from lora_init.layers.routed_rows import routed_rows
from lora_init.weights.kinds import known_format


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", ROUTED)
def test_an_expert_reads_the_tokens_that_select_it(layout):
    module, hidden = experts(layout), draws(4, HIDDEN)
    # Expert 0 has no token, and one pair has no expert.
    index = torch.tensor([[1, 2], [4, 1], [EXPERTS, 3], [3, 4]])
    first, down = known_format(module).matrices(module)
    found = list(routed_rows(module, hidden, index))
    assert [one.expert for one in found] == [1, 2, 3, 4]
    for one in found:
        wanted = [token for token in range(4) if one.expert in index[token]]
        assert sorted(one.tokens.tolist()) == wanted
        assert torch.equal(one.rows[first], hidden[one.tokens])
        states = one.rows[first] @ known_format(module).read(module, first)[one.expert].T
        if hasattr(module, f"{first}_bias"):
            states = states + getattr(module, f"{first}_bias")[one.expert]
        torch.testing.assert_close(one.rows[down], activated(module, states))


def test_every_expert_of_llama_4_reads_its_copy_of_the_tokens():
    if "all tokens" not in CLASSES:
        pytest.skip("this version of transformers has no Llama-4")
    module, hidden = experts("all tokens"), draws(3 * EXPERTS, HIDDEN)
    found = list(routed_rows(module, hidden, None))
    assert [one.expert for one in found] == list(range(EXPERTS))
    for one in found:
        assert torch.equal(one.rows["gate_up_proj"], hidden[3 * one.expert : 3 * one.expert + 3])
        assert one.rows["down_proj"].shape == (3, WIDTH)


def test_the_rows_have_no_graph():
    module, hidden = experts("concatenated"), draws(4, HIDDEN).requires_grad_()
    module.requires_grad_(True)
    for one in routed_rows(module, hidden, torch.tensor([[0], [1], [1], [0]])):
        assert not any(rows.requires_grad for rows in one.rows.values())


@pytest.mark.parametrize("layout", [layout for layout in CLASSES if layout != "norm after"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_the_gradient_of_a_matrix_is_the_sum_over_its_rows(layout, implementation):
    """The gradient of `down_proj` is read from the parameter, in the module's layout."""
    module = experts(layout, implementation)
    module.down_proj.requires_grad_(True)
    hidden = draws(4 * EXPERTS, HIDDEN)
    index = torch.randint(EXPERTS, (4 * EXPERTS, 1), generator=torch.Generator().manual_seed(0))
    weights = torch.ones(len(index), 1)
    inputs = [hidden] if layout == "all tokens" else [hidden, index, weights]
    module(*inputs).sum().backward()
    gradient = known_format(module).stored(module, module.down_proj.grad)
    expected = torch.zeros_like(gradient)
    for one in routed_rows(module, hidden, None if layout == "all tokens" else index):
        expected[one.expert] = one.rows["down_proj"].sum(0)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
