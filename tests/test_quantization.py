"""Quantisers against bitsandbytes, against LoftQ's definitions written out, and at their edges."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import norm

from lora_init.quantization import NF4_TABLE, Quantizer, normal_float_table

QUANTIZERS = [
    Quantizer(),
    Quantizer("nf4", 4, 32),
    Quantizer("nf2", 2),
    Quantizer("uniform", 2),
    Quantizer("uniform", 4),
    Quantizer("uniform", 8, 128),
    Quantizer("int8", 8),
]
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.name)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest_by_distance(weight, table, scale):
    """The (numel, table) array of distances that the module avoids."""
    distance = (weight[..., None] / scale[..., None, None] - table).abs()
    return table[distance.argmin(-1)] * scale[..., None]


@pytest.mark.parametrize("shape", [(64, 96), (7, 131), (384, 384), (12, 256)])
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_nf4_is_bitsandbytes(shape, block_size):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(*shape) * 0.02
    packed, state = functional.quantize_4bit(
        weight, blocksize=block_size, quant_type="nf4", compress_statistics=False
    )
    quantizer = Quantizer("nf4", 4, block_size)
    quantized = quantizer.quantize(weight)

    pairs = packed.flatten()
    theirs = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[: weight.numel()]
    assert torch.equal(quantized.codes.flatten(), theirs)
    assert torch.equal(quantized.scale, state.absmax)
    # bitsandbytes 0.50's AVX-512 kernel restarts the blocks at each row: elsewhere it is wrong.
    if shape[1] % block_size == 0:
        expected = functional.dequantize_4bit(packed, state)
        torch.testing.assert_close(quantizer.dequantize(quantized), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(64, 96), (5, 33)])
def test_int8_is_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(*shape) * 0.02
    codes, scale, _ = functional.int8_vectorwise_quant(weight.clone())
    expected = functional.int8_vectorwise_dequant(codes, scale)
    quantizer = Quantizer("int8", 8)
    quantized = quantizer.quantize(weight)
    assert torch.equal(quantized.codes, codes)
    assert torch.equal(quantized.scale, scale)
    torch.testing.assert_close(quantizer.dequantize(quantized), expected, rtol=1e-6, atol=0)


def test_int8_rounds_half_to_even_per_row():
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0], [1.0, -2.0, 0.3, 0.0]])
    quantized = Quantizer("int8", 8).quantize(weight)
    assert quantized.codes.dtype == torch.int8
    assert quantized.codes[0].tolist() == [127, 0, 2, -2]
    assert quantized.codes[1].tolist() == [0, 0, 0, 0]
    assert quantized.scale.tolist() == [127.0, 0.0, 2.0]


def test_normal_float_tables():
    torch.testing.assert_close(normal_float_table(4), torch.tensor(NF4_TABLE), rtol=0, atol=1e-6)
    # LoftQ's NF2: the quantiles 0.9677083 and halfway to the median, scaled to ±1, and 0.
    inner = norm.ppf((0.9677083 + 0.5) / 2) / norm.ppf(0.9677083)
    torch.testing.assert_close(
        normal_float_table(2), torch.tensor([-1.0, 0.0, inner, 1.0], dtype=torch.float32)
    )
    edges = norm.ppf([1 - 0.9677083, 0.26614585, 0.5, 0.73385415, 0.9677083])
    middles = torch.tensor((edges[1:] + edges[:-1]) / 2)
    torch.testing.assert_close(
        normal_float_table(2, symmetric=True), (middles / middles.max()).float()
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_is_loftq(bits):
    weight = gaussian(32, 64) + 0.1
    blocks = weight.reshape(-1, 64)
    scale = blocks.mean(1) + 2.5 * blocks.std(1)
    expected = nearest_by_distance(blocks, torch.linspace(-1, 1, 2**bits), scale)
    actual = Quantizer("uniform", bits).roundtrip(weight)
    torch.testing.assert_close(actual, expected.reshape(weight.shape))


def test_nf2_is_loftq():
    weight = gaussian(32, 64)
    blocks = weight.reshape(-1, 64)
    expected = nearest_by_distance(blocks, normal_float_table(2), blocks.abs().amax(1))
    torch.testing.assert_close(Quantizer("nf2", 2).roundtrip(weight), expected.reshape(32, 64))


def test_uniform_survives_blocks_of_negative_mean():
    weight = gaussian(4, 64) * 0.1 - 1.0
    error = (Quantizer("uniform", 8).roundtrip(weight) - weight).abs().max()
    assert error < 0.25  # the clipped tail, not the whole block
    constant = torch.full((2, 64), -0.5)
    torch.testing.assert_close(Quantizer("uniform", 2).roundtrip(constant), constant)


def test_error_on_gaussian_weights():
    weight = gaussian(512, 512)

    def error(quantizer):
        return ((quantizer.roundtrip(weight) - weight).norm() / weight.norm()).item()

    assert error(Quantizer()) == pytest.approx(0.092, abs=0.001)
    assert error(Quantizer("int8", 8)) < 0.01
    assert error(Quantizer()) < error(Quantizer("nf2", 2)) < 0.6
    assert error(Quantizer("uniform", 8)) < error(Quantizer("uniform", 4)) < 0.15


@every_quantizer
def test_result_is_float32_of_the_same_shape_and_repeatable(quantizer):
    weight = gaussian(33, 70)
    kept = weight.clone()
    first = quantizer.roundtrip(weight)
    assert first.shape == weight.shape
    assert first.dtype == torch.float32
    assert torch.equal(first, quantizer.roundtrip(weight))
    assert torch.equal(weight, kept)
    half = weight.bfloat16()
    assert torch.equal(quantizer.roundtrip(half), quantizer.roundtrip(half.float()))
    # The blocks follow the logical order, whatever the strides.
    assert torch.equal(quantizer.roundtrip(weight.T.contiguous().T), first)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("nf2", 2)])
def test_absmax_grids_are_fixed_points(kind, bits):
    quantizer = Quantizer(kind, bits)
    once = quantizer.roundtrip(gaussian(40, 50))
    assert torch.equal(quantizer.roundtrip(once), once)


@pytest.mark.parametrize("quantizer", QUANTIZERS[:-1], ids=lambda q: q.name)
def test_short_last_block_is_a_block_of_its_own(quantizer):
    size = quantizer.block_size
    weight = gaussian(1, 2 * size + 3)
    quantized = quantizer.quantize(weight)
    assert quantized.codes.dtype == torch.uint8
    assert quantized.scale.shape == (3,)
    whole = quantizer.dequantize(quantized)
    assert torch.equal(whole[:, : 2 * size], quantizer.roundtrip(weight[:, : 2 * size]))
    assert torch.equal(whole[:, 2 * size :], quantizer.roundtrip(weight[:, 2 * size :]))
    assert quantizer.roundtrip(weight[:, :1]).isfinite().all()


@every_quantizer
def test_zero_and_tiny_blocks(quantizer):
    weight = torch.zeros(4, 128)
    assert torch.equal(quantizer.roundtrip(weight), weight)
    weight[1] = 1e-41
    weight[2] = gaussian(1, 128)[0]
    values = quantizer.roundtrip(weight)
    assert values.isfinite().all()
    assert torch.equal(values[0], weight[0])
    assert values[2].abs().sum() > 0


@every_quantizer
def test_dictionary_round_trip(quantizer):
    assert Quantizer.from_dict(quantizer.to_dict()) == quantizer


def test_names():
    names = [quantizer.name for quantizer in QUANTIZERS]
    assert names == [
        "nf4/64", "nf4/32", "nf2/64", "uniform2/64", "uniform4/64", "uniform8/128", "int8"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"kind": "fp4"}, ["kind='fp4'", "nf4, nf2, uniform, int8"]),
        ({"kind": "nf2"}, ["bits=4", "kind='nf2'", "set bits=2"]),
        ({"kind": "uniform", "bits": 3}, ["bits=3", "2 or 4 or 8"]),
        ({"kind": "int8", "bits": 4}, ["bits=4", "set bits=8"]),
        ({"block_size": 0}, ["block_size=0", "at least 1"]),
        ({"block_size": 64.0}, ["block_size=64.0", "integer"]),
    ],
)
def test_bad_options_are_named(options, fragments):
    with pytest.raises(ValueError, match="allowed") as error:
        Quantizer(**options)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_bad_calls_are_named():
    with pytest.raises(ValueError, match=r"no setting blocksize.*block_size"):
        Quantizer.from_dict({"blocksize": 64})
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Quantizer().quantize(torch.zeros(3))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        Quantizer().quantize(torch.zeros(3, 3, dtype=torch.int64))
    quantized = Quantizer().quantize(gaussian(4, 4))
    with pytest.raises(ValueError, match="made by nf4/64, not by nf2/64"):
        Quantizer("nf2", 2).dequantize(quantized)
