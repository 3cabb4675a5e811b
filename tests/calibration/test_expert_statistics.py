"""Statistics of single experts: their rows, their gradients, and experts with too few tokens."""

import warnings

import pytest
import torch
from expert_mixture import Mixture, mixture_rows
from expert_modules import CLASSES, EXPERTS
from measures import relative_gap
from models import Batches

from lora_init import LoraConfig, calibrate, get_peft_model
from lora_init.calibration.few_tokens import with_layer_statistics
from lora_init.layers.routed_product import activated
from lora_init.weights.experts import first_projection

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def found_in(model, method, batches, **settings):
    config = LoraConfig(r=2, init_lora_weights=method, target_parameters=PARAMETERS)
    return calibrate(model, config, Batches(batches), **settings).layers


def rows_of(model, x, expert):
    """The rows of an expert's two matrices, computed in float64."""
    block = model.experts
    hidden = model.entry(x).double()
    indices, scores = model.routing(model.entry(x))
    token, place = torch.where(indices == expert)
    stored = block.gate_up_proj[expert].double()
    states = hidden[token] @ (stored if block.is_transposed else stored.T)
    if block.has_bias:
        states = states + block.gate_up_proj_bias[expert].double()
    return hidden[token], block._apply_gate(states), scores[token, place]


@pytest.mark.parametrize("layout", ["concatenated", "interleaved, transposed, biased"])
def test_the_moments_of_an_expert_are_those_of_the_tokens_routed_to_it(layout):
    model, batches = Mixture(layout), mixture_rows()
    found = found_in(model, "corda", batches)
    assert len(found) == 2 * EXPERTS
    with torch.no_grad():
        for expert in range(EXPERTS):
            parts = [rows_of(model, x, expert)[:2] for x in batches]
            for name, rows in zip(
                PARAMETERS, map(torch.cat, zip(*parts, strict=True)), strict=True
            ):
                inputs = found[f"{name}.{expert}"].inputs
                assert inputs.tokens == len(rows)
                assert relative_gap(inputs.second_moment, rows.T @ rows / len(rows)) < 1e-5


@pytest.mark.parametrize("layout", ["concatenated", "interleaved, transposed, biased"])
def test_the_gradient_of_an_expert_is_its_part_of_the_parameters(layout):
    model, batches = Mixture(layout), mixture_rows()
    model.experts.down_proj.grad = kept = torch.ones_like(model.experts.down_proj)
    found = found_in(model, "lora_ga", batches)
    assert model.experts.down_proj.grad is kept
    assert not any(p.requires_grad for p in model.experts.parameters())
    twin = Mixture(layout)
    twin.experts.requires_grad_(True)
    for batch in batches:
        (Batches.loss(twin, batch) / len(batches)).backward()
    for name in PARAMETERS:
        gradient = twin.get_parameter(name).grad
        gradient = gradient.mT if twin.experts.is_transposed else gradient
        for expert in range(EXPERTS):
            assert relative_gap(found[f"{name}.{expert}"].gradient, gradient[expert]) < 1e-5


def test_masked_tokens_do_not_count():
    class Language(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixture = Mixture()

        def forward(self, inputs, attention_mask=None):
            return self.mixture(inputs)

    model, x = Language(), torch.stack([mixture_rows(1, 6)[0], mixture_rows(1, 6, seed=7)[0]])
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 3:] = 0
    config = LoraConfig(r=2, init_lora_weights="corda", target_parameters=PARAMETERS)
    found = calibrate(model, config, [{"inputs": x, "attention_mask": mask}])
    tokens = sum(found.layers[f"mixture.experts.down_proj.{e}"].inputs.tokens
                 for e in range(EXPERTS))  # fmt: skip
    assert tokens == 2 * 9  # two experts per token


class Partial(Mixture):
    """A mixture whose router never chooses the last expert."""

    def routing(self, hidden):
        scores, indices = (hidden @ self.router[:-1].T).softmax(-1).topk(2)
        return indices, scores


@pytest.mark.parametrize("method", ["corda", "lora_ga"])
def test_an_expert_without_tokens_starts_from_its_whole_layer(method):
    model, batches = Partial(), Batches(mixture_rows())
    config = LoraConfig(r=2, init_lora_weights=method, target_parameters=PARAMETERS)
    with pytest.warns(UserWarning, match=r"2 of 10 experts' matrices .*'experts.gate_up_proj.4'"):
        lora = get_peft_model(model, config, calibration=batches, cache=False)
    layer = lora.layers["experts.down_proj"]
    assert layer.lora_A[-1].norm() > 0
    assert torch.isfinite(layer.lora_A).all()


def test_no_token_at_all_is_an_error():
    class Unused(Mixture):
        def forward(self, x):
            return self.entry(x)

    config = LoraConfig(r=2, init_lora_weights="eva", target_parameters=PARAMETERS)
    with pytest.raises(ValueError, match="no token reached the target 'experts.gate_up_proj'"):
        get_peft_model(Unused(), config, calibration=mixture_rows(), cache=False)


def test_limited_memory_and_saved_statistics_give_the_same_start(tmp_path):
    batches = mixture_rows()
    config = LoraConfig(r=2, init_lora_weights="corda", target_parameters=PARAMETERS)
    plan = get_peft_model(Mixture(), config, dry_run=True)
    memory = plan.input_bytes(plan.targets[0])
    assert plan.statistics_bytes > memory
    calibrate(Mixture(), config, batches).save(tmp_path / "found")
    saved = type(calibrate(Mixture(), config, batches)).load(tmp_path / "found")
    settings = [{}, {"calibration_memory": memory}, {"calibration": saved}]
    starts = []
    for one in settings:
        lora = get_peft_model(Mixture(), config, **({"calibration": batches} | one), cache=False)
        starts.append({name: layer.initial_product() for name, layer in lora.layers.items()})
    for other in starts[1:]:
        for name, product in starts[0].items():
            assert relative_gap(other[name], product) < 1e-5


@pytest.mark.parametrize("method", ["eva", "gora"])
def test_allocation_keeps_the_rank_of_experts(method):
    config = LoraConfig(r=2, init_lora_weights=method, target_modules=["entry"],
                        target_parameters=PARAMETERS)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = get_peft_model(Mixture(), config, calibration=Batches(mixture_rows()), cache=False)
    assert {lora.layers[name].rank for name in PARAMETERS} == {2}
    plan = get_peft_model(Mixture(), config, dry_run=True)
    assert "experts keep one rank for all" in str(plan)


LAYOUTS = ("concatenated", "interleaved, transposed, biased", "no gate")


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("layout", [one for one in LAYOUTS if one in CLASSES])
def test_the_output_moments_of_an_expert_are_those_of_its_tokens(layout, implementation):
    model, batches = Mixture(layout), mixture_rows()
    model.experts.config._experts_implementation = implementation
    first = first_projection(model.experts)
    names = [f"experts.{first}", "experts.down_proj"]
    config = LoraConfig(r=2, init_lora_weights="lora_da", target_parameters=names)
    forward = model.experts.forward
    found = calibrate(model, config, Batches(batches)).layers
    assert model.experts.forward == forward
    sums = {}
    for x in batches:
        outputs = {}
        Batches.loss(lambda x, kept=outputs: kept_outputs(model, x, kept), x).backward()
        for key, states in outputs.items():
            sums[key] = sums.get(key, 0) + states.grad.square().sum(0)
    for (matrix, expert), squares in sums.items():
        one = found[f"experts.{matrix}.{expert}"]
        assert relative_gap(one.output_moments, squares / one.inputs.tokens) < 1e-5
        assert one.gradient.shape == (len(squares), one.inputs.mean.shape[0])


def kept_outputs(model, x, kept):
    """The model's output in float64; keeps the outputs of each expert's matrices."""
    block, hidden = model.experts, model.entry(x).double()
    indices, scores = model.routing(hidden)
    total = torch.zeros_like(hidden)
    for expert in range(EXPERTS):
        token, place = torch.where(indices == expert)
        rows = hidden[token]
        for matrix in (first_projection(block), "down_proj"):
            stored = getattr(block, matrix)[expert].double()
            rows = rows @ (stored if getattr(block, "is_transposed", False) else stored.T)
            bias = getattr(block, f"{matrix}_bias", None)
            rows = rows if bias is None else rows + bias[expert].double()
            rows.requires_grad_(True) if rows.is_leaf else rows.retain_grad()
            kept[matrix, expert] = rows
            if matrix != "down_proj":
                rows = activated(block, rows)
        total = total.index_add(0, token, rows * scores[token, place, None])
    return total


class AllTokens(Mixture):
    """Llama-4 gives every expert all tokens, those of other experts multiplied by zero."""

    def __init__(self):
        super().__init__("all tokens")

    def forward(self, x):
        hidden = self.entry(x)
        indices, scores = self.routing(hidden)
        weights = torch.zeros(len(x), EXPERTS).scatter(1, indices, scores).T.reshape(-1, 1)
        return self.experts(hidden.repeat(EXPERTS, 1) * weights).view(EXPERTS, *x.shape).sum(0)


@pytest.mark.skipif("all tokens" not in CLASSES, reason="transformers without Llama-4")
def test_the_output_moments_of_llama_4_leave_out_tokens_of_other_experts():
    model, (x,) = AllTokens(), mixture_rows(1)
    config = LoraConfig(r=2, init_lora_weights="lora_da", target_parameters=PARAMETERS)
    found = calibrate(model, config, Batches([x])).layers
    with torch.no_grad():
        hidden = model.entry(x).double()
        indices, scores = model.routing(model.entry(x))
    kept, total = {}, torch.zeros_like(hidden)
    for expert in range(EXPERTS):
        token, place = torch.where(indices == expert)
        rows = hidden[token] * scores[token, place, None]
        both = (rows @ model.experts.gate_up_proj[expert].double()).requires_grad_()
        down = activated(model.experts, both) @ model.experts.down_proj[expert].double()
        down.retain_grad()
        total = total.index_add(0, token, down)
        kept |= {f"experts.gate_up_proj.{expert}": both, f"experts.down_proj.{expert}": down}
    Batches.loss(lambda x: total, x).backward()
    for name, states in kept.items():
        assert found[name].inputs.tokens == len(states)
        assert relative_gap(found[name].output_moments, states.grad.square().mean(0)) < 1e-5


def test_an_expert_without_tokens_has_all_statistics_of_its_layer():
    config = LoraConfig(r=2, init_lora_weights="lora_da", target_parameters=PARAMETERS)
    model, batches = Partial(), Batches(mixture_rows())
    found = calibrate(model, config, batches)
    assert not found.layers["experts.down_proj.4"].output_moments.any()
    plan = get_peft_model(Partial(), config, dry_run=True).in_matrices()
    with pytest.warns(UserWarning, match="got fewer tokens"):
        whole = with_layer_statistics(plan, found).layers["experts.down_proj.4"]
    layers = [found.layers[f"experts.down_proj.{expert}"] for expert in range(EXPERTS)]
    tokens = torch.tensor([one.inputs.tokens for one in layers]).double()
    assert whole.inputs.tokens == tokens.sum()
    moments = torch.stack([one.output_moments for one in layers])
    assert relative_gap(whole.output_moments, tokens @ moments / tokens.sum()) < 1e-12
    assert relative_gap(whole.gradient, sum(one.gradient.double() for one in layers)) < 1e-6
