"""One linear layer of each quantizer, packed by its own package where that runs on a CPU."""

import functools

import pytest
import quantizers
import torch
from torch import nn

COLUMNS, ROWS = 64, 32


def float_layer(dtype=torch.float32, columns=COLUMNS, rows=ROWS):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Linear(columns, rows).to(dtype).requires_grad_(False)


def of_torchao(configuration, dtype=torch.float32, **settings):
    library = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(float_layer(dtype))
    library.quantize_(model, getattr(library, configuration)(**settings))
    return model[0]


def of_torchao_nf4():
    library = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    module = float_layer()
    codes = library.to_nf4(module.weight.detach(), scaler_block_size=8)
    module.weight = nn.Parameter(codes, requires_grad=False)
    return module


def of_hqq(bits, axis, dtype=torch.float32):
    library = pytest.importorskip("hqq.core.quantize")
    settings = library.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
    return library.HQQLinear(float_layer(dtype), settings, compute_dtype=dtype, device="cpu")


def of_quanto(weights, *, frozen=True, dtype=torch.float32, **settings):
    library = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(float_layer(dtype))
    library.quantize(model, weights=getattr(library, weights), **settings)
    if frozen:
        library.freeze(model)
    return model[0]


def of_compressed_tensors(preset, dtype=torch.float32, *, compressed=True):
    """A layer that decompresses itself in its first forward pass, as a whole model does."""
    library = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import compress_module, decompress_module
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model = nn.Sequential(float_layer(dtype, 2 * COLUMNS))
    scheme = preset_name_to_scheme(preset, ["Linear"])
    library.apply_quantization_config(model, library.QuantizationConfig(config_groups={"": scheme}))
    (module,) = model
    groups = module.weight.reshape(*module.weight_scale.shape, -1)
    scale, zero = calculate_qparams(
        groups.amin(-1), groups.amax(-1), module.quantization_scheme.weights
    )
    module.weight_scale.data = scale.to(dtype)
    module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)
    if compressed:
        compress_module(module)
        module.register_forward_pre_hook(decompressed(decompress_module))
    return module.requires_grad_(False)


def decompressed(decompress_module):
    def hook(module, args):
        if module.quantization_status.value == "compressed":
            decompress_module(module)

    return hook


def of_transformers(block_size, dtype=torch.float32):
    """FP8Linear, whose kernel needs a GPU: its forward multiplies by independent values here."""
    library = pytest.importorskip("transformers.integrations.finegrained_fp8")

    class OnCPU(library.FP8Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.original.to(x.dtype), self.bias)

    plain = float_layer(dtype)
    module = OnCPU(COLUMNS, ROWS, block_size=block_size, has_bias=True).requires_grad_(False)
    module.bias.data = plain.bias.data
    rows, columns = block_size or (ROWS, COLUMNS)
    module.original = torch.empty(ROWS, COLUMNS)
    for row in range(0, ROWS, rows):
        for column in range(0, COLUMNS, columns):
            block = slice(row, row + rows), slice(column, column + columns)
            scale = plain.weight[block].abs().max().float() / 448
            codes = (plain.weight[block].float() / scale).to(torch.float8_e4m3fn)
            module.weight.data[block] = codes
            module.original[block] = module.weight[block].float() * scale
            if block_size is None:
                module.weight_scale_inv.data = scale
            else:
                module.weight_scale_inv.data[row // rows, column // columns] = scale
    return module


LAYERS = {
    "GPTQ": lambda: quantizers.QuantLinear(),
    "GPTQ act-order": lambda: quantizers.TorchQuantLinear(ordered=False),
    "AWQ": lambda: quantizers.WQLinear_GEMM(),
    "AWQ gemv": lambda: quantizers.WQLinear_GEMV(),
    "torchao": lambda: of_torchao("Int8WeightOnlyConfig"),
    "torchao dynamic": lambda: of_torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": lambda: of_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao float8": lambda: of_torchao("Float8WeightOnlyConfig"),
    "torchao nf4": of_torchao_nf4,
    "HQQLinear": lambda: of_hqq(4, 1),
    "HQQLinear axis 0": lambda: of_hqq(3, 0),
    "QLinear": lambda: of_quanto("qint8"),
    "QLinear float8": lambda: of_quanto("qfloat8"),
    "QLinear not frozen": lambda: of_quanto("qint8", frozen=False),
    "compressed-tensors": lambda: of_compressed_tensors("W4A16"),
    "compressed-tensors int8": lambda: of_compressed_tensors("W8A8"),
    "compressed-tensors float8": lambda: of_compressed_tensors("FP8_DYNAMIC"),
    "FP8Linear": lambda: of_transformers((16, 32)),
    "FP8Linear one scale": lambda: of_transformers(None),
    "AQLM": lambda: quantizers.QuantizedLinear(COLUMNS, ROWS),
    "EETQ": lambda: quantizers.EetqLinear(COLUMNS, ROWS),
    "BitNet": lambda: quantizers.BitLinear(COLUMNS, ROWS),
    "INC": lambda: quantizers.PatchedLinear(COLUMNS, ROWS),
}
"""Functions that make a layer, by the name of its format, and a variant."""


def quantized_layer(kind):
    """A new layer, and the number of its inputs."""
    module = LAYERS[kind]()
    return module, getattr(module, "in_features", COLUMNS)


def _with_input(kind):
    module, columns = quantized_layer(kind)
    return module, torch.randn(6, columns, generator=torch.Generator().manual_seed(0))


EXAMPLES = {kind: functools.partial(_with_input, kind) for kind in LAYERS}
