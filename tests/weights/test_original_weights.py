"""Original weights from safetensors: layouts, names, laziness, and what is refused."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from lora_init.weights.checkpoint import OriginalWeights

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(6, 4, generator=generator),
        "model.layers.0.mlp.up.weight": torch.randn(5, 4, generator=generator).bfloat16(),
        "model.layers.0.mlp.up.bias": torch.randn(5, generator=generator),
        "model.layers.1.mlp.up.weight": torch.randn(5, 4, generator=generator).half(),
        "model.norm.weight": torch.randn(4, generator=generator).double(),
    }


def write_single(folder, values):
    save_file(values, folder / "model.safetensors")
    return folder


def write_file(folder, values):
    save_file(values, folder / "any_name.safetensors")
    return folder / "any_name.safetensors"


def write_sharded(folder, values):
    halves = (
        {k: v for i, (k, v) in enumerate(values.items()) if i % 2},
        {k: v for i, (k, v) in enumerate(values.items()) if not i % 2},
    )
    for shard, half in zip(SHARDS, halves, strict=True):
        save_file(half, folder / shard)
    places = {key: SHARDS[key in halves[1]] for key in values}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_unindexed(folder, values):
    write_sharded(folder, values)
    (folder / "model.safetensors.index.json").unlink()
    return folder


def as_mapping(folder, values):
    return values


LAYOUTS = [write_single, write_file, write_sharded, write_unindexed, as_mapping]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)


@every_layout
def test_weights_as_stored(tmp_path, layout):
    values = tensors()
    original = OriginalWeights(layout(tmp_path, values))
    for key, value in values.items():
        name, _, part = key.rpartition(".")
        if part != "weight":
            continue
        assert original.has(name)
        assert original.key(name) == key
        assert original.shape(name) == tuple(value.shape)
        read = original.weight(name)
        assert read.dtype == value.dtype
        assert torch.equal(read, value)
        assert not read.requires_grad
    assert not original.has("model.layers.2.mlp.up")


def test_path_as_a_string(tmp_path):
    write_single(tmp_path, tensors())
    assert OriginalWeights(str(tmp_path)).shape("model.norm") == (4,)


def test_parameters_are_a_mapping_too():
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2))
    read = OriginalWeights(dict(layer.named_parameters())).weight("0")
    assert torch.equal(read, layer[0].weight)
    assert not read.requires_grad


# -- laziness --------------------------------------------------------------------------------------


def test_other_shards_are_left_alone(tmp_path):
    """An index and the asked tensor's own shard are all that is opened."""
    original = OriginalWeights(write_sharded(tmp_path, tensors()))
    (tmp_path / SHARDS[1]).write_bytes(b"gone")
    assert torch.equal(
        original.weight("model.layers.0.mlp.up"), tensors()["model.layers.0.mlp.up.weight"]
    )
    with pytest.raises(ValueError, match=f"original_weights: .*{SHARDS[1]} is damaged"):
        original.weight("model.norm")


@every_layout
def test_copies_and_pickles(tmp_path, layout):
    original = OriginalWeights(layout(tmp_path, tensors()))
    original.weight("model.norm")
    for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert torch.equal(twin.weight("model.norm"), tensors()["model.norm.weight"])


def test_writing_into_a_weight_leaves_the_file_alone(tmp_path):
    original = OriginalWeights(write_single(tmp_path, tensors()))
    original.weight("model.norm").zero_()
    assert torch.equal(original.weight("model.norm"), tensors()["model.norm.weight"])


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("model.layers.0.up", "layers.0.up"),
        ("layers.0.up", "model.layers.0.up"),
        ("bert.encoder.layer.0.query", "encoder.layer.0.query"),
        ("encoder.layer.0.query", "bert.encoder.layer.0.query"),
        ("base_model.model.layers.0.up", "model.layers.0.up"),
        ("base_model.layers.0.up", "model.layers.0.up"),
        ("base_model.model.model.layers.0.up", "layers.0.up"),
        ("model.layers.0.up", "base_model.model.layers.0.up"),
        ("base_model.lm_head", "lm_head"),
        ("wrapper.0", "0"),
    ],
)
def test_a_prefix_more_on_one_side(name, key):
    value = torch.ones(2, 3)
    original = OriginalWeights({f"{key}.weight": value, "other.weight": torch.zeros(1)})
    assert original.has(name)
    assert original.key(name) == f"{key}.weight"
    assert original.weight(name) is not None
    assert torch.equal(original.weight(name), value)


def test_the_exact_name_comes_first():
    original = OriginalWeights(
        {"up.weight": torch.zeros(1), "layers.up.weight": torch.ones(2), "a.layers.up.weight": None}
    )
    assert original.shape("layers.up") == (2,)
    assert original.shape("base_model.layers.up") == (2,)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("model.layers.0.up", ["layers.1.up", "model.layers.0.down"]),
        ("model.layers.0.up", ["ers.0.up"]),  # not a whole part
        ("layers.0.up", ["layers.10.up", "xlayers.0.up"]),
        ("model.layers.0.up", ["other.layers.0.up"]),  # two different prefixes
        ("up", []),
    ],
)
def test_what_is_no_match(name, keys):
    original = OriginalWeights({f"{key}.weight": torch.zeros(1) for key in keys})
    assert not original.has(name)
    with pytest.raises(ValueError, match=f"original_weights: .* no weight for '{name}'"):
        original.weight(name)


def test_a_weight_without_a_name_matches_no_module():
    """A file of one bare layer would otherwise match every module."""
    assert not OriginalWeights({"weight": torch.zeros(2, 2)}).has("model.layers.0.up")


def test_several_matches_are_refused():
    original = OriginalWeights(
        {"vision.layers.0.up.weight": torch.zeros(1), "text.layers.0.up.weight": torch.zeros(1)}
    )
    assert not original.has("layers.0.up")
    for read in (original.weight, original.shape, original.key):
        with pytest.raises(ValueError, match=r"'layers.0.up' could be any of 'vision.*', 'text"):
            read("layers.0.up")


def test_a_missing_weight_is_named_with_its_neighbours(tmp_path):
    original = OriginalWeights(write_single(tmp_path, tensors()))
    with pytest.raises(ValueError, match=r"'model.layers.7.mlp.up'.*nearest.*'model.layers.\d"):
        original.weight("model.layers.7.mlp.up")
    with pytest.raises(ValueError, match=r"no weight for 'lm_head'.*tied.*other module's name"):
        original.weight("lm_head")
    with pytest.raises(ValueError, match="it holds 4 others"):
        original.shape("xyz")


# -- refused sources -------------------------------------------------------------------------------


def test_no_such_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"original_weights: .*nowhere.*snapshot_download"):
        OriginalWeights(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_never_loaded(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileNotFoundError, match=f"'{name}' is a pickle.*save_pretrained"):
        OriginalWeights(tmp_path)
    with pytest.raises(ValueError, match=f"{name}' is not a .safetensors file.*save_pretrained"):
        OriginalWeights(tmp_path / name)


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors, .*pass the folder"):
        OriginalWeights(tmp_path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid x"])
def test_damaged_file(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"original_weights: .*damaged.*Download it again"):
        OriginalWeights(tmp_path)


def test_cut_file(tmp_path):
    path = write_file(tmp_path, tensors())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"any_name.safetensors is damaged"):
        OriginalWeights(path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a.weight": 3}}'])
def test_damaged_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json is damaged.*weight_map"):
        OriginalWeights(tmp_path)


def test_missing_shard(tmp_path):
    write_sharded(tmp_path, tensors())
    (tmp_path / SHARDS[0]).unlink()
    with pytest.raises(FileNotFoundError, match=f"'{SHARDS[0]}', not in the folder; download"):
        OriginalWeights(tmp_path)


def test_index_that_promises_too_much(tmp_path):
    write_sharded(tmp_path, tensors())
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = SHARDS[0]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{SHARDS[0]} is damaged .*model.extra.weight"):
        OriginalWeights(tmp_path).weight("model.extra")


def test_one_tensor_in_two_files(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"up.weight": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"'a.safetensors' and 'b.safetensors'.*'up.weight'"):
        OriginalWeights(tmp_path)


@pytest.mark.wrong_types
@pytest.mark.parametrize("source", [3, None, torch.nn.Linear(2, 2), [("up.weight", 1)]])
def test_source_of_another_type(source):
    with pytest.raises(TypeError, match=r"original_weights is of type .*model.state_dict\(\)"):
        OriginalWeights(source)


# -- refused tensors -------------------------------------------------------------------------------

CODES = torch.zeros(8, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("values", "finding"),
    [
        ({"up.weight": CODES}, "'up.weight' as (U8|torch.uint8)"),
        ({"up.weight": CODES.to(torch.int8), "up.SCB": torch.ones(8)}, "'up.SCB'"),
        ({"up.weight": CODES, "up.weight.quant_state.bitsandbytes__nf4": CODES + 1}, "nf4'"),
        # bnb_4bit_quant_storage="bfloat16": codes that look like numbers.
        ({"up.weight": CODES.bfloat16(), "up.weight.absmax": torch.ones(1)}, "'up.weight.absmax'"),
        ({"up.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, "F8_E4M3|float8_e4m3fn"),
        ({"up.qweight": CODES.int(), "up.scales": torch.ones(1)}, "'up.qweight'"),
        ({"up.weight": torch.zeros(2, 2, dtype=torch.bool)}, "BOOL|bool"),
    ],
)
@pytest.mark.parametrize("layout", [write_single, as_mapping], ids=lambda f: f.__name__)
def test_quantised_checkpoints_are_refused(tmp_path, layout, values, finding):
    original = OriginalWeights(layout(tmp_path, values | {"down.weight": torch.ones(2, 2)}))
    for read in (original.weight, original.shape):
        with pytest.raises(ValueError, match=rf"'up' is quantized already.*({finding}).*bfloat16"):
            read("up")
    assert original.shape("down") == (2, 2)


@pytest.mark.wrong_types
def test_mapping_of_something_else():
    original = OriginalWeights(
        {"up.weight": [[1.0]], "down.weight": torch.empty(2, 2, device="meta"), 3: torch.ones(1)}
    )
    with pytest.raises(ValueError, match=r"original_weights\['up.weight'\] is .*list.*state_dict"):
        original.weight("up")
    with pytest.raises(ValueError, match="meta device"):
        original.shape("down")
