"""An adapter that is injected is used, or its layer is named."""

import warnings

import pytest
import torch
from models import llama, token_batches
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_init import LoraConfig, get_peft_model


class HeldElsewhere(nn.Module):
    """`aside` is also in a list, in a closure or in a plain attribute, and called there."""

    def __init__(self, how="list"):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.aside = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        aside = self.aside
        if how == "list":
            held = [aside]
            self.call = lambda x: held[0](x)
        elif how == "closure":
            self.call = lambda x: aside(x)
        elif how == "method":
            self.call = aside.forward.__self__
            del self._modules["call"]
            self.__dict__["call"] = aside
        else:  # its weight is read, the module is never called
            self.call = lambda x: nn.functional.linear(x, aside.weight, aside.bias)

    def forward(self, x):
        return self.call(torch.tanh(self.first(x)))


def config(*targets, method="pissa", **settings):
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=method, **settings)


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("method", ["pissa", "kaiming", "loftq"])
@pytest.mark.parametrize("how", ["list", "closure", "method"])
def test_a_bypassed_layer_is_refused_and_everything_put_back(how, method):
    base = HeldElsewhere(how)
    before, draws = state_of(base), torch.get_rng_state()
    with pytest.raises(ValueError, match="'aside'") as refusal:
        get_peft_model(base, config("first", "aside", method=method), verify=torch.randn(3, 8))
    assert "'first'" not in str(refusal.value)
    after = state_of(base)
    assert after.keys() == before.keys()
    assert all(torch.allclose(after[key], before[key], atol=1e-7) for key in before)
    assert all(type(module) is not type(base) or module is base for module in base.modules())
    assert base.training
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not any(module._forward_pre_hooks for module in base.modules())
    assert torch.get_rng_state().shape == draws.shape


def test_a_weight_that_is_read_elsewhere_shows_in_the_output():
    with pytest.raises(ValueError, match="output differs"):
        get_peft_model(HeldElsewhere("weight"), config("aside"), verify=torch.randn(3, 8))


def test_a_layer_that_the_batch_does_not_reach_is_named():
    with pytest.warns(UserWarning, match="'unused'") as found:
        get_peft_model(HeldElsewhere(), config("first", "unused"), verify=torch.randn(3, 8))
    assert "'first'" not in str(found[0].message)


@pytest.mark.parametrize("method", ["pissa", "kaiming", "olora", "loftq"])
def test_a_model_in_order_passes_without_a_word(method):
    base = llama()
    draws = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = token_batches(1)[0]
        model = get_peft_model(base, config("q_proj", "v_proj", method=method), verify=batch)
        model(**batch)
    assert torch.equal(torch.get_rng_state(), draws)


def test_a_module_trained_whole_is_checked_too():
    settings = config("first", modules_to_save=["aside"])
    with pytest.raises(ValueError, match="'aside'"):
        get_peft_model(HeldElsewhere(), settings, verify=torch.randn(3, 8))


# -- the first forward pass ------------------------------------------------------------------------


def test_the_first_pass_names_layers_that_were_not_used_once():
    model = get_peft_model(HeldElsewhere(), config("first", "aside"))
    x = torch.randn(3, 8)
    with pytest.warns(UserWarning, match="'aside'") as found:
        model(x)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_weight_that_is_read_counts_as_used():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return x @ self.layer.weight.T

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(Reader(), config("layer"))(torch.randn(3, 8))


@pytest.mark.wrong_types
def test_a_pass_that_fails_leaves_the_check_for_the_next_one():
    model = get_peft_model(HeldElsewhere(), config("first", "aside"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError):
            model(torch.randn(3, 5))
        with model.disable_adapter():
            model(torch.randn(3, 8))
    with pytest.warns(UserWarning, match="'aside'"):
        model(torch.randn(3, 8))


@pytest.mark.wrong_types
def test_a_compiled_pass_leaves_the_check_pending():
    model = get_peft_model(HeldElsewhere(), config("first", "aside"))
    x = torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.compile(model, fullgraph=True, backend="eager")(x)
    with pytest.warns(UserWarning, match="'aside'"):
        model(x)


class Selector(nn.Module):
    """A model that uses one of its layers only to choose rows, and drops the output of another."""

    def __init__(self):
        super().__init__()
        self.score, self.value, self.extra = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        self.extra(x)
        return self.value(x[self.score(x).sum(-1).topk(2).indices])


@pytest.mark.parametrize("first", ["training", "evaluation"])
def test_a_layer_that_gets_no_gradient_is_named(first):
    model = get_peft_model(Selector(), LoraConfig(r=2, target_modules=["score", "value", "extra"]))
    if first == "evaluation":
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            model(torch.randn(4, 8))
    message = "2 of 3 adapted layers get no gradient .* 'score', 'extra'"
    with pytest.warns(UserWarning, match=message):
        model(torch.randn(4, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, 8))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_hides_no_gradient(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            inside = checkpoint(self.first, x, use_reentrant=reentrant)
            return self.second(inside)

    model = get_peft_model(Checkpointed(), LoraConfig(r=2, target_modules=["first", "second"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, 8, requires_grad=True)).sum().backward()
