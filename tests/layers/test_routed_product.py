"""Experts with low-rank updates: values and gradients against float64, in every layout."""

import pytest
import torch
from expert_modules import CLASSES, EXPERTS, HIDDEN, ROUTED, experts
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lora_init.layers.routed_product import Update, routed_output
from lora_init.weights.kinds import known_format

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
RANK, SCALING, TOKENS, TOP_K = 3, 1.5, 13, 2
HALVES = [torch.bfloat16, torch.float16]

layouts = pytest.mark.parametrize("layout", CLASSES)
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def draws(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def router(layout):
    """The experts of each token and their weights. Expert 1 has no token."""
    if layout == "all tokens":
        return None, None
    index = torch.stack([torch.randperm(EXPERTS - 1)[:TOP_K] for _ in range(TOKENS)])
    index[index >= 1] += 1
    return index, draws(TOKENS, TOP_K, seed=2).abs().requires_grad_()


def tokens(layout):
    count = 4 * EXPERTS if layout == "all tokens" else TOKENS
    return draws(count, HIDDEN, seed=1).requires_grad_()


def updates(module, *, subtracts=False, dtype=torch.float32, moved=0.1):
    """An update of each matrix, `moved` away from its start."""
    one, found = known_format(module), {}
    for seed, name in enumerate(one.matrices(module)):
        _, rows, columns = one.shape(module, name)
        A0 = draws(EXPERTS, RANK, columns, seed=seed).to(dtype) / 3
        B0 = draws(EXPERTS, rows, RANK, seed=seed + 9).to(dtype) / 3
        A, B = ((f + moved * torch.randn_like(f)).requires_grad_() for f in (A0, B0))
        found[name] = Update(A, B, SCALING, *((A0, B0) if subtracts else ()))
    return found


def reference(module, hidden, index, weights, given):
    """In float64: the module's own forward with the updated weights."""
    own = {name: value.double() for name, value in module.state_dict().items()}
    for name, update in given.items():
        A, B = update.lora_A.double(), update.lora_B.double()
        delta = B @ A
        if update.initial_A is not None:
            delta = delta - update.initial_B.double() @ update.initial_A.double()
        own[name] = own[name] + SCALING * known_format(module).stored(module, delta)
    inputs = [hidden.double()] if index is None else [hidden.double(), index, weights.double()]
    former = getattr(module, "config", None) and module.config._experts_implementation
    try:
        if former:
            module.config._experts_implementation = "eager"
        return torch.func.functional_call(module, own, tuple(inputs))
    finally:
        if former:
            module.config._experts_implementation = former


def leaves(hidden, weights, given):
    factors = [factor for one in given.values() for factor in (one.lora_A, one.lora_B)]
    return [hidden, *([] if weights is None else [weights]), *factors]


def distance(actual, expected):
    expected = expected.double()
    return (torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected)).item()


@layouts
@implementations
@pytest.mark.parametrize("subtracts", [False, True], ids=["kept", "subtracted"])
def test_values_and_gradients_are_those_of_the_updated_weights(layout, implementation, subtracts):
    module, hidden = experts(layout, implementation), tokens(layout)
    index, weights = router(layout)
    given = updates(module, subtracts=subtracts)
    inputs = leaves(hidden, weights, given)
    actual = routed_output(module, hidden, index, weights, given)
    expected = reference(module, hidden, index, weights, given)
    assert distance(actual, expected) <= 2e-6
    upstream = draws(*actual.shape, seed=7)
    found = torch.autograd.grad(actual, inputs, upstream)
    wanted = torch.autograd.grad(expected, inputs, upstream.double())
    for one, other in zip(found, wanted, strict=True):
        assert distance(one, other) <= 1e-5


@layouts
@implementations
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_updates_of_a_16_bit_base_are_computed_in_float32(layout, implementation, dtype):
    module, hidden = experts(layout, implementation, dtype), tokens(layout).to(dtype)
    index, weights = router(layout)
    weights = None if weights is None else weights.to(dtype)
    given = updates(module, subtracts=True)
    actual = routed_output(module, hidden, index, weights, given)
    assert actual.dtype == dtype
    expected = reference(module, hidden, index, weights, given)
    assert distance(actual, expected) <= 4 * torch.finfo(dtype).eps


@layouts
@implementations
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_subtracted_start_cancels_exactly_at_step_0(layout, implementation, dtype):
    module, hidden = experts(layout, implementation, dtype), tokens(layout).to(dtype)
    index, weights = router(layout)
    weights = None if weights is None else weights.to(dtype)
    given = updates(module, subtracts=True, moved=0)
    actual = routed_output(module, hidden, index, weights, given)
    assert torch.equal(actual, routed_output(module, hidden, index, weights, {}))
    own = [hidden] if index is None else [hidden, index, weights]
    assert distance(actual, module(*own)) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", ROUTED)
@implementations
def test_pairs_without_an_expert_add_nothing(layout, implementation):
    module, hidden = experts(layout, implementation), tokens(layout)
    index, weights = router(layout)
    index[3] = EXPERTS
    index[5, 0] = EXPERTS
    given = updates(module)
    inputs = leaves(hidden, weights, given)
    actual = routed_output(module, hidden, index, weights, given)
    assert torch.equal(actual[3], torch.zeros(HIDDEN))
    found = torch.autograd.grad(actual.sum(), inputs)
    kept = torch.where(index < EXPERTS, weights.detach(), 0).requires_grad_()
    without = routed_output(module, hidden, index.clamp(max=EXPERTS - 1), kept, given)
    assert torch.equal(actual, without)
    others = torch.autograd.grad(without.sum(), leaves(hidden, kept, given))
    for position, (one, other) in enumerate(zip(found, others, strict=True)):
        assert torch.equal(one, other) or position == 1
    assert torch.equal(found[1][index == EXPERTS], torch.zeros(3))


@implementations
def test_no_tokens_give_no_outputs(implementation):
    module = experts("concatenated", implementation)
    index, weights = torch.zeros(0, TOP_K, dtype=torch.long), torch.zeros(0, TOP_K)
    hidden, given = torch.zeros(0, HIDDEN, requires_grad=True), updates(module)
    actual = routed_output(module, hidden, index, weights, given)
    assert actual.shape == (0, HIDDEN)
    actual.sum().backward()
    assert not any(one.lora_A.grad.any() for one in given.values())


@layouts
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_training_step_forms_nothing_of_the_size_of_a_weight(layout, implementation):
    """batched_mm is left out: its base selects a weight for each row."""

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(found):
                if isinstance(tensor, torch.Tensor) and not is_stored(tensor):
                    sizes.append(tensor.numel())
            return found

    module = experts(layout, implementation)
    one, given, sizes = known_format(module), updates(module, subtracts=True), []
    weights = [getattr(module, name) for name in one.matrices(module)]
    memory = {weight.untyped_storage().data_ptr() for weight in weights}

    def is_stored(tensor):
        return tensor.untyped_storage().data_ptr() in memory

    rows = 2 * EXPERTS
    hidden = draws(rows, HIDDEN, seed=1).requires_grad_()
    index = torch.arange(rows).reshape(-1, 1) % EXPERTS
    routed = (None, None) if layout == "all tokens" else (index, torch.ones(rows, 1))
    with Sizes():
        routed_output(module, hidden, *routed, given).sum().backward()
    assert max(sizes) < min(weight.numel() for weight in weights)
    assert all(weight.grad is None for weight in weights)


@implementations
def test_checkpointing_gives_the_same_gradients(implementation):
    module, hidden = experts("concatenated", implementation), tokens("concatenated")
    index, weights = router("concatenated")
    given = updates(module)
    inputs = leaves(hidden, weights, given)
    arguments = module, hidden, index, weights, given
    plain = torch.autograd.grad(routed_output(*arguments).sum(), inputs)
    again = checkpoint(routed_output, *arguments, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(again.sum(), inputs), plain, strict=True):
        assert torch.equal(one, other)


@layouts
@implementations
def test_autocast_computes_the_base_as_the_module_does(layout, implementation):
    module, hidden = experts(layout, implementation), tokens(layout)
    index, weights = router(layout)
    own = [hidden] if index is None else [hidden, index, weights]
    given = updates(module, subtracts=True, moved=0)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(*own)
        actual = routed_output(module, hidden, index, weights, given)
        moved = routed_output(module, hidden, index, weights, updates(module))
        moved.sum().backward()
    assert actual.dtype == expected.dtype
    assert distance(actual, expected) <= 4 * torch.finfo(torch.bfloat16).eps
    assert hidden.grad.isfinite().all()


def test_dropout_reaches_the_trained_product_only():
    module, hidden = experts("concatenated"), tokens("concatenated")
    index, weights = router("concatenated")
    start = updates(module, subtracts=True, moved=0)
    dropped = {name: update._replace(dropout=torch.zeros_like) for name, update in start.items()}
    actual = routed_output(module, hidden, index, weights, dropped)
    negative = {
        name: Update(update.initial_A, update.initial_B, -SCALING) for name, update in start.items()
    }
    expected = routed_output(module, hidden, index, weights, negative)
    torch.testing.assert_close(actual, expected)


def test_an_unknown_implementation_is_refused_by_name():
    module, hidden = experts("concatenated", "sonicmoe"), tokens("concatenated")
    with pytest.raises(RuntimeError, match="experts_implementation='sonicmoe' is not supported"):
        routed_output(module, hidden, *router("concatenated"), {})


@pytest.mark.parametrize(
    "implementation",
    [
        "grouped_mm",
        pytest.param("eager", marks=pytest.mark.exhaustive),
        pytest.param("batched_mm", marks=pytest.mark.exhaustive),
    ],
)
def test_compiling_breaks_no_graph(implementation):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = experts("concatenated", implementation)

        def forward(self, hidden, index, weights, given):
            return routed_output(self.experts, hidden, index, weights, given)

    layer, hidden = Layer(), tokens("concatenated")
    index, weights = router("concatenated")
    given = updates(layer.experts, subtracts=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    actual, expected = (f(hidden, index, weights, given) for f in (compiled, layer))
    inputs = leaves(hidden, weights, given)
    found, wanted = (torch.autograd.grad(output.sum(), inputs) for output in (actual, expected))
    for one, other in zip((actual, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one, other)
