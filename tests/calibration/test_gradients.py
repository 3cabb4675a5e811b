"""The gradient pass: exact sums, whatever the layers are; a model as it was; bounded memory."""

import copy
import itertools

import pytest
import torch
from measures import relative_gap
from models import bert, gpt2, llama, t5, token_batches
from networks import PACKED_SHAPES, Chain, Pictures, chain_inputs
from packing import kept_plain
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lora_init import WithLoss
from lora_init.calibration.collect import collect
from lora_init.calibration.gradients import collect_gradients
from lora_init.registry import CalibrationRequest
from lora_init.weights.kinds import module_type, oriented_weight

GRADIENTS = CalibrationRequest(gradients=True)


def linear_names(model):
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]


def labelled(classes=None, seed=0):
    """Padded batches of different sizes, whose losses are means over as many labels."""
    batches = []
    for size, batch in enumerate(token_batches(count=3, seed=seed), start=2):
        batch = {name: value[:size] for name, value in batch.items()}
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append(batch | {"labels": labels[:, 0] % classes if classes else labels})
    return batches


def reference(model, names, batches, loss=lambda model, batch: model(**batch).loss):
    """The mean of `weight.grad` over batches, all of the model in float64; tied weights untied."""
    model = copy.deepcopy(model).double().requires_grad_(False)
    weights = {}
    for name in names:
        module = model.get_submodule(name)
        module.weight = weights[name] = nn.Parameter(module.weight.detach().clone())
    for batch in batches:
        (loss(model, batch) / len(batches)).backward()
    kinds = {name: module_type(model.get_submodule(name)) for name in names}
    return {
        name: weight.grad.T if kinds[name] == "Conv1D" else weight.grad.flatten(1)
        for name, weight in weights.items()
    }


def assert_same(actual, expected, tolerance=1e-5):
    assert list(actual) == list(expected)
    for name, gradient in actual.items():
        assert gradient.dtype == torch.float32
        assert not gradient.requires_grad
        assert relative_gap(gradient, expected[name]) <= tolerance, name


def mean_square(model, batch):
    return model(batch).square().mean()


# -- what is summed --------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize(
    ("make", "classes"), [(llama, None), (gpt2, None), (bert, 3), (t5, None)],
    ids=["llama", "gpt2", "bert", "t5"],
)  # fmt: skip
def test_mean_over_batches_of_the_models_own_gradient(make, classes, frozen):
    """Every linear layer, with heads that are tied to an embedding (gpt2, t5)."""
    model, batches = make().requires_grad_(not frozen), labelled(classes)
    names = linear_names(model)
    with torch.no_grad():  # as a caller may have it
        actual = collect_gradients(model, names, iter(batches))
    assert_same(actual, reference(model, names, batches))


def test_the_calibration_counts_what_it_read():
    model, batches = llama(), labelled()
    found = collect(model, ["lm_head"], GRADIENTS, batches)
    assert found.layers["lm_head"].inputs is None
    assert torch.equal(
        found.layers["lm_head"].gradient, collect_gradients(model, ["lm_head"], batches)["lm_head"]
    )
    assert found.batches == 3
    assert found.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)


def test_a_loss_of_the_callers_own():
    model, batches = Chain(), [chain_inputs(10, seed=seed) for seed in (1, 2)]
    names = linear_names(model)
    found = collect(model, names, GRADIENTS, WithLoss(batches, mean_square)).layers
    doubles = [batch.double() for batch in batches]
    expected = reference(model, names, doubles, mean_square)
    assert_same({name: layer.gradient for name, layer in found.items()}, expected)


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one picture"])
def test_convolutions_through_the_unfolded_matrix(batched):
    model = Pictures()
    x = torch.randn(3, 4, 8, 7, generator=torch.Generator().manual_seed(0))
    batches = [x] if batched else list(x)
    names = ["square", "strided", "dilated"]
    actual = collect_gradients(model, names, batches, loss=mean_square)
    assert_same(actual, reference(model, names, [x.double() for x in batches], mean_square))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_products_and_sums_are_not_rounded_to_the_models_dtype(dtype):
    """One layer under a linear loss: x and g are exact in every dtype, only their sum is not."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16)).to(dtype)
    slope = torch.randn(16, generator=generator).to(dtype)
    batches = [torch.randn(40, 24, generator=generator).to(dtype) for _ in range(5)]
    actual = collect_gradients(
        model, ["0"], batches, loss=lambda model, batch: (model(batch) * slope).sum()
    )
    total = sum(batch.double().sum(0) for batch in batches)
    assert_same(actual, {"0": torch.outer(slope.double(), total / len(batches))}, 1e-6)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("Linear4bit", 1e-5), ("Linear8bitLt", 0.03)], ids=["4 bits", "int8"]
)
def test_packed_weights_have_the_gradient_of_their_dequantised_ones(kind, tolerance):
    """The kernel of int8 rounds its inputs to 8 bits, so that all that follows is another."""
    packed = kept_plain(Chain(kind))
    twin = Chain(shapes=PACKED_SHAPES)
    for name in PACKED_SHAPES:
        twin.get_submodule(name).weight.data = oriented_weight(packed.get_submodule(name))
    batches = [chain_inputs(20, 64, seed=seed) for seed in (1, 2)]
    expected = reference(twin, list(PACKED_SHAPES), [b.double() for b in batches], mean_square)
    flags = {name: p.requires_grad for name, p in packed.named_parameters()}
    actual = collect_gradients(packed, list(PACKED_SHAPES), batches, loss=mean_square)
    assert_same(actual, expected, tolerance)
    assert flags == {name: p.requires_grad for name, p in packed.named_parameters()}


class Twice(nn.Module):
    """A layer that is called twice, once by keyword, and whose outputs are written to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.again, self.end = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        first = nn.functional.relu(self.again(x), inplace=True)
        second = self.again(input=first)
        second += 1
        return self.end(second)


def test_a_layer_called_twice_and_outputs_written_to():
    model, batches = Twice(), [torch.randn(5, 6) for _ in range(2)]
    actual = collect_gradients(model, ["again", "end"], batches, loss=mean_square)
    doubles = [batch.double() for batch in batches]
    assert_same(actual, reference(model, ["again", "end"], doubles, mean_square))


def test_an_input_written_to_afterwards_is_noticed():
    class Careless(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            x.zero_()
            return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        collect_gradients(Careless(nn.Linear(3, 3)), ["0"], [torch.ones(2, 3)], loss=mean_square)


# -- checkpointing ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_transformers_checkpointing_stays_on_and_changes_nothing(training):
    model, batches = llama(), labelled()
    names = linear_names(model)
    expected = reference(model, names, batches)
    model.gradient_checkpointing_enable()
    model.train(training)
    modes = {name: module.training for name, module in model.named_modules()}
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: calls.append(module))
    assert_same(collect_gradients(model, names, batches), expected)
    assert len(calls) == 2 * len(batches)  # forward, and again in the backward pass
    assert modes == {name: module.training for name, module in model.named_modules()}


def test_checkpointing_keeps_no_input():
    class Checkpointed(Chain):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model, x = Checkpointed(), chain_inputs(10)
    actual = collect_gradients(model, ["square", "wide"], [x], loss=mean_square)
    expected = reference(Chain(), ["square", "wide"], [x.double()], mean_square)
    assert_same(actual, expected)


# -- what is left behind ---------------------------------------------------------------------------


class Fragile(Chain):
    """Draws, and fails at its second batch."""

    def __init__(self):
        super().__init__()
        self.batches = 0

    def forward(self, x):
        torch.rand(3)
        self.batches += 1
        if self.batches == 2:
            raise OSError("no more")
        return super().forward(x)


def test_nothing_is_left_behind_even_by_a_failure():
    model = Fragile().train()
    model.tall.eval().weight.requires_grad_(False)
    model.wide.weight.grad = torch.ones_like(model.wide.weight)
    state = torch.get_rng_state()

    def facts():
        return (
            [(module.training, len(module._forward_hooks)) for module in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [None if p.grad is None else float(p.grad.sum()) for p in model.parameters()],
        )

    before = facts()
    with pytest.raises(OSError, match="no more"):
        collect_gradients(model, ["square", "wide"], [chain_inputs(4)] * 3, loss=mean_square)
    assert facts() == before
    assert torch.equal(torch.get_rng_state(), state)
    collect_gradients(model, ["square", "wide"], [chain_inputs(4)] * 3, loss=mean_square)
    assert facts() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_is_that_of_the_sums():
    """`Parameter.grad` and the sums would take twice the weights."""
    width, depth = 256, 10
    layer_bytes = 4 * width**2
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
    x = torch.ones(1, width)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        collect_gradients(model, [str(i) for i in range(depth)], [x, x], loss=mean_square)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    peak = max(itertools.accumulate(changes))
    assert depth * layer_bytes <= peak < (depth + 0.2) * layer_bytes


# -- refusals --------------------------------------------------------------------------------------


def refused(message, model, names, batches, **settings):
    with pytest.raises(ValueError, match=message):
        collect_gradients(model, names, batches, **settings)
    assert not any(module._forward_hooks for module in model.modules())


def test_batches_without_labels():
    refused(
        "batch of input_ids, attention_mask the model returned a CausalLMOutputWithPast without "
        "one; pass batches with labels.*WithLoss",
        llama(), ["lm_head"], token_batches(),
    )  # fmt: skip
    refused("returned a Tensor without one", Chain(), ["tall"], [chain_inputs(3)])


def test_no_batch():
    refused("gave no batch", Chain(), ["tall"], iter([]))


def test_a_batch_whose_labels_are_all_ignored():
    batch = token_batches(1)[0]
    ignored = batch | {"labels": torch.full_like(batch["input_ids"], -100)}
    refused(r"loss of batch 2 is nan.*-100", llama(), ["lm_head"], [*labelled()[:1], ignored])


def test_a_loss_that_is_no_scalar():
    refused(
        r"loss of batch 1 is a Tensor of shape \(3, 24\).*take its mean",
        Chain(), ["tall"], [chain_inputs(3)], loss=lambda model, batch: model(batch),
    )  # fmt: skip


def test_a_layer_that_the_loss_does_not_reach():
    model = Chain()
    model.unused = nn.Linear(2, 2)
    for names in (["unused"], ["tall", "unused"]):
        refused(
            "no gradient reached the target 'unused'; exclude it", model, names,
            [chain_inputs(3)], loss=mean_square,
        )  # fmt: skip


def test_a_gradient_that_is_not_finite():
    refused(
        "gradient of 'square' is not finite.*float16", Chain(), ["tall", "square"],
        [torch.zeros(3, 32)], loss=lambda model, batch: model(batch).sum() + (
            0 * model.square(batch)).sum().sqrt(),
    )  # fmt: skip
