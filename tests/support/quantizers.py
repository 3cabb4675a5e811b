"""Modules of quantizers that cannot be installed, with the class names and layouts of their own.

Each one is packed by plain loops over its integers, and computes with the weight that was packed.
`original` is that weight, dequantized independently of the library.
"""

import torch
from torch import nn
from torch.nn import functional


class Packed(nn.Module):
    """A linear layer whose forward multiplies by the weight that it was packed from."""

    def __init__(self, rows, columns, bias):
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.register_buffer("bias", bias)

    def forward(self, x):
        return functional.linear(x, self.original.to(x.dtype), self.bias)


def stream(rows, bits):
    """Integers as one sequence of bits per row, the lowest bit first, in signed 32-bit words."""
    packed = []
    for row in rows.tolist():
        whole = sum(value << bits * index for index, value in enumerate(row))
        words = [whole >> 32 * n & 0xFFFFFFFF for n in range(bits * len(row) // 32)]
        packed.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(packed, dtype=torch.int32)


def draws(rows, columns, groups, bits, seed, dtype):
    """Integers, zero points, scales and a bias."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) + 0.5) / (1 << bits)
    return codes, zeros, scales.to(dtype), torch.randn(rows, generator=generator).to(dtype)


def dequantized(codes, zeros, scales, group_of):
    weight = torch.empty(codes.shape)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            group = int(group_of[column])
            integer = int(codes[row, column]) - int(zeros[row, group])
            weight[row, column] = float(scales[row, group]) * integer
    return weight


class QuantLinear(Packed):
    """AutoGPTQ's layer; zero points are stored minus 1."""

    version = 1

    def __init__(
        self, rows=32, columns=64, bits=4, groups=2, ordered=True, seed=0, dtype=torch.float32
    ):
        codes, zeros, scales, bias = draws(rows, columns, groups, bits, seed, dtype)
        super().__init__(rows, columns, bias)
        self.bits, self.group_size = bits, columns // groups
        group_of = torch.arange(columns) // self.group_size
        if not ordered:
            group_of = group_of[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
        self.original = dequantized(codes, zeros, scales, group_of)
        stored = (zeros - 1) % (1 << bits) if self.version == 1 else zeros
        self.register_buffer("qweight", stream(codes, bits).T.contiguous())
        self.register_buffer("qzeros", stream(stored.T, bits))
        self.register_buffer("scales", scales.T.contiguous())
        self.register_buffer("g_idx", group_of.to(torch.int32))


class BaseQuantLinear(QuantLinear):
    """The base class of GPT-QModel's layers, each of which says how zero points are stored."""

    def qzero_format(self):
        return self.version


class TorchQuantLinear(BaseQuantLinear):
    version = 2


class TritonV2QuantLinear(TorchQuantLinear):
    pass


class MarlinQuantLinear(TorchQuantLinear):
    """A kernel that stores the integers in an order of its own."""


GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class WQLinear_GEMM(Packed):
    """AutoAWQ's layer: (in, out), eight outputs in a word, interleaved."""

    def __init__(self, rows=32, columns=64, group_size=32, seed=0, dtype=torch.float32):
        groups = columns // group_size
        codes, zeros, scales, bias = draws(rows, columns, groups, 4, seed, dtype)
        super().__init__(rows, columns, bias)
        self.w_bit, self.group_size = 4, group_size
        self.original = dequantized(codes, zeros, scales, torch.arange(columns) // group_size)
        order = [8 * word + one for word in range(rows // 8) for one in GEMM_ORDER]
        self.register_buffer("qweight", stream(codes.T[:, order], 4))
        self.register_buffer("qzeros", stream(zeros.T[:, order], 4))
        self.register_buffer("scales", scales.T.contiguous())


class WQLinear_GEMV(Packed):
    """AutoAWQ's layer: (out, in), eight inputs in a word, with padded groups."""

    def __init__(self, rows=32, columns=64, group_size=32, seed=0, dtype=torch.float32):
        groups = columns // group_size
        codes, zeros, scales, bias = draws(rows, columns, groups, 4, seed, dtype)
        super().__init__(rows, columns, bias)
        self.w_bit, self.group_size = 4, group_size
        self.original = dequantized(codes, zeros, scales, torch.arange(columns) // group_size)
        self.register_buffer("qweight", stream(codes, 4))
        self.register_buffer("qzeros", stream(functional.pad(zeros, (0, 8 - groups)), 4))
        self.register_buffer("scales", functional.pad(scales, (0, 8 - groups)))


class WQLinear_Marlin(WQLinear_GEMM):
    """A kernel that stores the integers in an order of its own."""


class WQLinear_GEMVFast(WQLinear_GEMV):
    """A layout that is not read."""


class QuantizedLinear(nn.Linear):
    """AQLM's layer, whose codes only its kernels read."""


class EetqLinear(Packed):
    """EETQ's layer: int8 codes (in, out) and a scale for each output."""

    def __init__(self, columns, rows):
        codes, _, scales, bias = draws(rows, columns, 1, 7, 0, torch.float32)
        super().__init__(rows, columns, bias)
        self.original = (codes - 64) * scales
        self.weight = nn.Parameter((codes - 64).T.to(torch.int8), requires_grad=False)
        self.weight_scales = nn.Parameter(scales[:, 0], requires_grad=False)


class PatchedLinear(Packed):
    """Intel Neural Compressor's layer: float8 values (in, out) and one scale."""

    def __init__(self, columns, rows):
        codes, _, scales, bias = draws(rows, columns, 1, 4, 0, torch.float32)
        super().__init__(rows, columns, bias)
        self.original = (codes - 8) * scales[0]
        values = (codes - 8).T.to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale_weight = nn.Parameter(scales[0, 0], requires_grad=False)


class BitLinear(nn.Linear):
    """BitNet's layer, whose codes only its kernels read."""
