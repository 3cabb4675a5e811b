"""Quantizers against bitsandbytes, against LoftQ's definitions, and at their edges."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import norm

from lora_init.quantization import NF4_TABLE, Quantizer, normal_float_table
from lora_init.quantization.codebooks import dynamic_table

QUANTIZERS = [
    Quantizer(),
    Quantizer("nf4", 4, 32),
    Quantizer("nf4", 4, 64, double=True),
    Quantizer("fp4"),
    Quantizer("fp4", 4, 32, double=True),
    Quantizer("nf2", 2),
    Quantizer("uniform", 2),
    Quantizer("uniform", 4),
    Quantizer("uniform", 8, 128),
    Quantizer("int8", 8),
]
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.name)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(64, 96), (7, 131), (384, 384), (12, 256), (3, 5)])
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_four_bits_are_bitsandbytes(shape, block_size, kind, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(*shape) * 0.02
    packed, state = functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=kind, compress_statistics=double
    )
    quantizer = Quantizer(kind, 4, block_size, double)
    # bitsandbytes computes the mean of the scales in float32.
    quantized = quantizer.quantize(weight, averages_in=torch.float32)
    assert torch.equal(quantized.codes.flatten(), unpacked(packed, weight.numel()))
    if double:
        assert torch.equal(quantized.nested.codes, state.absmax)
        assert torch.equal(quantized.nested.scale, state.state2.absmax)
        assert torch.equal(quantized.nested.offset, state.offset)
        assert torch.equal(dynamic_table(), state.state2.code)
    else:
        assert torch.equal(quantized.scale, state.absmax)
    # With AVX-512, bitsandbytes 0.50 restarts the blocks at each row: elsewhere it is wrong.
    if shape[1] % block_size == 0 or shape[1] % 2:
        expected = functional.dequantize_4bit(packed, state)
        assert torch.equal(quantizer.dequantize(quantized), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_ties_are_bitsandbytes(kind):
    functional = pytest.importorskip("bitsandbytes.functional")
    table = functional.get_4bit_type(kind, device="cpu").sort().values
    midpoints = (table[1:] + table[:-1]) / 2
    around = [torch.nextafter(midpoints, torch.full_like(midpoints, side)) for side in (-2.0, 2.0)]
    weight = torch.cat([midpoints, *around, table, torch.tensor([-0.0, 1e-9, -1e-9])])[None]
    packed, _ = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    codes = Quantizer(kind).quantize(weight).codes
    assert torch.equal(codes.flatten(), unpacked(packed, weight.numel()))


def unpacked(packed, count):
    pairs = packed.flatten()
    return torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[:count]


@pytest.mark.parametrize("shape", [(64, 96), (5, 33)])
def test_int8_is_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = gaussian(*shape) * 0.02
    codes, scale, _ = functional.int8_vectorwise_quant(weight.clone())
    quantizer = Quantizer("int8", 8)
    quantized = quantizer.quantize(weight)
    assert torch.equal(quantized.codes, codes)
    assert torch.equal(quantized.scale, scale)
    expected = functional.int8_vectorwise_dequant(codes, scale)
    assert torch.equal(quantizer.dequantize(quantized), expected)


def test_int8_rounds_half_to_even_per_row():
    weight = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0], [1.0, -2.0, 0.3, 0.0]])
    quantized = Quantizer("int8", 8).quantize(weight)
    assert quantized.codes.dtype == torch.int8
    assert quantized.codes[0].tolist() == [127, 0, 2, -2]
    assert quantized.codes[1].tolist() == [0, 0, 0, 0]
    assert quantized.scale.tolist() == [127.0, 0.0, 2.0]


FP4_MAGNITUDES = torch.tensor([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
DEFINITIONS = [
    ("fp4", 4, torch.cat([FP4_MAGNITUDES, -FP4_MAGNITUDES[1:]])),
    ("nf2", 2, normal_float_table(2)),
    *(("uniform", bits, torch.linspace(-1, 1, 2**bits)) for bits in (2, 4, 8)),
]


@pytest.mark.parametrize(("kind", "bits", "table"), DEFINITIONS)
def test_values_are_the_nearest_by_distance(kind, bits, table):
    blocks = gaussian(32, 64) + 0.1
    scale = blocks.mean(1) + 2.5 * blocks.std(1) if kind == "uniform" else blocks.abs().amax(1)
    distance = (blocks[..., None] / scale[:, None, None] - table).abs()
    expected = table[distance.argmin(-1)] * scale[:, None]
    torch.testing.assert_close(Quantizer(kind, bits).roundtrip(blocks), expected)


@pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if q.averages], ids=lambda q: q.name)
def test_scales_do_not_depend_on_the_order_of_a_sum(quantizer):
    """Each device sums in its own order, and the checksum of a base covers every bit."""
    size = quantizer.block_size
    for seed in range(5):
        blocks = gaussian(40, 16 * size, seed=seed).reshape(-1, size)
        found = quantizer.quantize(blocks.reshape(40, -1))
        turned = quantizer.quantize(blocks.flip(0, 1).reshape(40, -1))
        if quantizer.double:
            assert torch.equal(turned.nested.offset, found.nested.offset)
        else:
            assert torch.equal(turned.scale.flip(0), found.scale)


def test_double_quantization_is_its_formula():
    weight = (gaussian(60, 640).double() * torch.linspace(0.01, 3, 60)[:, None]).float()
    single, double = Quantizer().quantize(weight), Quantizer(double=True).quantize(weight)
    assert torch.equal(single.codes, double.codes)
    shifted = single.scale.double() - single.scale.double().mean()
    table = dynamic_table().double()
    expected = []
    for block in shifted.split(256):
        largest = block.abs().max()
        nearest = (block[:, None] / largest - table).abs().argmin(1)
        expected.append(table[nearest] * largest)
    expected = torch.cat(expected) + single.scale.double().mean()
    # bitsandbytes' steps of 2 / 65535 may choose the neighbor of a value that is nearly as near.
    assert (double.scale - expected).abs().max() < 0.02 * shifted.abs().max()
    assert ((double.scale - expected).abs() < 1e-5).double().mean() > 0.98
    assert double.scale.sub(single.scale).norm() < 0.01 * single.scale.norm()


def test_normal_float_tables():
    torch.testing.assert_close(normal_float_table(4), torch.tensor(NF4_TABLE), rtol=0, atol=1e-6)
    # LoftQ's NF2: the quantiles 0.9677083 and halfway to the median, scaled to ±1, and 0.
    inner = norm.ppf((0.9677083 + 0.5) / 2) / norm.ppf(0.9677083)
    expected = torch.tensor([-1.0, 0.0, inner, 1.0], dtype=torch.float32)
    torch.testing.assert_close(normal_float_table(2), expected)


def test_uniform_survives_blocks_of_negative_mean():
    weight = gaussian(4, 64) * 0.1 - 1.0
    error = (Quantizer("uniform", 8).roundtrip(weight) - weight).abs().max()
    assert error < 0.25  # the clipped tail, not the whole block
    constant = torch.full((2, 64), -0.5)
    torch.testing.assert_close(Quantizer("uniform", 2).roundtrip(constant), constant)


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
    if quantizer.kind in ("nf4", "fp4", "nf2") and not quantizer.double:
        assert torch.equal(quantizer.roundtrip(first), first)  # a fixed point
    assert Quantizer.from_dict(quantizer.to_dict()) == quantizer


@pytest.mark.parametrize(
    "quantizer", [q for q in QUANTIZERS[:-1] if not q.double], ids=lambda q: q.name
)
def test_short_last_block_has_its_own_scale(quantizer):
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


def test_names_and_dictionaries_of_older_files():
    assert [quantizer.name for quantizer in QUANTIZERS] == [
        "nf4/64", "nf4/32", "nf4/64+double", "fp4/64", "fp4/32+double",
        "nf2/64", "uniform2/64", "uniform4/64", "uniform8/128", "int8",
    ]  # fmt: skip
    assert Quantizer.from_dict({"kind": "nf4", "bits": 4, "block_size": 32}) == QUANTIZERS[1]


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"kind": "int4"}, ["kind='int4'", "nf4, fp4, nf2, uniform, int8"]),
        ({"kind": "int8", "bits": 8, "double": True}, ["double=True", "kind='int8'"]),
        ({"double": 1}, ["double=1", "must be False"]),
        ({"kind": "nf2"}, ["bits=4", "kind='nf2'", "must be 2"]),
        ({"kind": "uniform", "bits": 3}, ["bits=3", "2 or 4 or 8"]),
        ({"kind": "int8", "bits": 4}, ["bits=4", "must be 8"]),
        ({"block_size": 0}, ["block_size=0", "at least 1"]),
        ({"block_size": 64.0}, ["block_size=64.0", "integer"]),
    ],
)
@pytest.mark.wrong_types
def test_bad_options_are_named(options, fragments):
    with pytest.raises(ValueError, match="not supported") as error:
        Quantizer(**options)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.wrong_types
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
