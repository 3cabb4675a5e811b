"""Modules trained whole, calls by keyword, and vocabularies that are resized after injection."""

import pytest
import torch
from models import VOCABULARY, bert, llama, token_batches
from networks import Case
from torch import nn

from lora_init import LoraConfig, LoraModel, get_peft_model


def adapted(base, targets, **settings):
    calls = {"adapter_dtype": settings.pop("adapter_dtype", torch.float32)}
    return get_peft_model(base, LoraConfig(r=4, target_modules=targets, **settings), **calls)


def weights(base):
    return {name: value.clone() for name, value in base.state_dict().items()}


# -- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("make", "targets", "saved"),
    [
        (bert, ["query"], ["classifier"]),
        (bert, ["query"], ["pooler"]),  # a module of several
        (llama, ["q_proj"], ["lm_head"]),
        (llama, ["q_proj"], ["embed_tokens"]),
        (llama, ["q_proj"], ["norm"]),
    ],
    ids=lambda value: str(value) if isinstance(value, list) else value.__name__,
)
def test_all_that_is_trained_is_float32(make, targets, saved, dtype, tmp_path):
    base = make().to(dtype)
    batch = token_batches(1)[0]
    with torch.no_grad():
        wanted = base(**batch).logits
    model = adapted(base, targets, modules_to_save=saved)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    logits = model(**batch).logits
    assert logits.dtype == dtype
    bound = 8 * torch.finfo(dtype).eps
    assert float((logits - wanted).abs().max() / wanted.abs().max()) < bound
    optimizer = torch.optim.SGD(trained, 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(logits.float().square().mean()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with torch.no_grad():
        after = model(**batch).logits
        model.save_pretrained(tmp_path)
        loaded = LoraModel.from_pretrained(make().to(dtype), tmp_path)
        assert torch.equal(loaded(**batch).logits, after)
        merged = model.merge_and_unload()
        assert {p.dtype for p in merged.parameters()} == {dtype}
        assert float((merged(**batch).logits - after).abs().max() / after.abs().max()) < bound


def test_a_weight_that_is_read_has_the_models_dtype():
    model = adapted(llama().half(), ["q_proj"], modules_to_save=["lm_head"])
    head = model.base_model.lm_head
    assert head.weight.dtype == torch.float16
    head.weight.float().sum().backward()
    assert head.trained_module.weight.grad.dtype == torch.float32


def test_a_narrow_adapter_dtype_does_not_narrow_a_head():
    settings = {"modules_to_save": ["lm_head"], "adapter_dtype": torch.bfloat16}
    head = adapted(llama(), ["q_proj"], **settings).base_model.lm_head
    assert head.trained_module.weight.dtype == torch.float32


def test_biases_trained_in_float16_are_warned_about():
    with pytest.warns(UserWarning, match="GradScaler"):
        adapted(bert().half(), ["query"], bias="lora_only")


# -- what cannot be trained whole ------------------------------------------------------------------


class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.list = nn.ModuleList([nn.Linear(4, 4)])
        self.dict = nn.ModuleDict({"one": nn.Linear(4, 4)})
        self.values = nn.ParameterList([nn.Parameter(torch.zeros(4))])

    def forward(self, x):
        return self.dict["one"](self.list[0](self.first(x))) + self.values[0]


@pytest.mark.parametrize("name", ["list", "dict", "values"])
def test_a_container_is_refused_before_anything_changes(name):
    base = Containers()
    before = weights(base)
    with pytest.raises(ValueError, match=f"modules_to_save='{name}' is not supported"):
        adapted(base, ["first"], modules_to_save=[name])
    assert weights(base).keys() == before.keys()


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_tied_module_is_warned_about(name):
    with pytest.warns(UserWarning, match="shares its memory"):
        adapted(llama(tied=True), ["q_proj"], modules_to_save=[name])


# -- calls by keyword ------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", ["input", "x"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d", "Embedding", "Linear4bit"])
def test_the_input_may_be_passed_by_name(kind, keyword):
    case = Case(kind)
    model = adapted(case.build(), list(case.shapes), init_lora_weights="random")
    for name, layer in model.layers.items():
        x = case.layer_inputs(name, 10)
        assert torch.equal(layer(**{keyword: x}), layer(x))


@pytest.mark.parametrize("arguments", [{}, {"y": 1}, {"input": 1, "x": 1}])
def test_other_arguments_are_refused(arguments):
    layer = adapted(Case().build(), ["square"]).layers["square"]
    with pytest.raises(TypeError, match="takes one input"):
        layer(**arguments)


# -- resizing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["head", "embedding", "trained head"],
)
@pytest.mark.filterwarnings("ignore:modules_to_save")
def test_resizing_an_adapted_vocabulary_is_refused_as_a_whole(settings, tied):
    model = get_peft_model(llama(tied=tied), LoraConfig(r=4, **settings))
    before = {name: value.shape for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="before get_peft_model"):
        model.resize_token_embeddings(VOCABULARY + 4)
    assert {name: value.shape for name, value in model.state_dict().items()} == before


@pytest.mark.parametrize("tied", [False, True])
def test_resizing_works_where_no_embedding_is_adapted(tied):
    model = adapted(llama(tied=tied), ["q_proj"], init_lora_weights="pissa")
    model.resize_token_embeddings(VOCABULARY + 4)
    assert model(**token_batches(1)[0]).logits.shape[-1] == VOCABULARY + 4
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
