"""Tiny models of diffusers with random weights: a UNet, a Flux transformer and a video one."""

import functools

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel, WanTransformer3DModel


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    ).eval()  # fmt: skip


def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip


def video():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip


def _normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@functools.cache
def inputs(kind):
    """The arguments of a forward pass of "unet", "flux" or "video"."""
    if kind == "unet":
        return {
            "sample": _normal(2, 4, 8, 8),
            "timestep": torch.tensor([3, 5]),
            "encoder_hidden_states": _normal(2, 3, 8),
        }
    if kind == "flux":
        return {
            "hidden_states": _normal(2, 4, 4),
            "encoder_hidden_states": _normal(2, 3, 16),
            "pooled_projections": _normal(2, 16),
            "timestep": torch.tensor([0.3, 1.0]),
            "img_ids": torch.zeros(4, 3),
            "txt_ids": torch.zeros(3, 3),
        }
    return {
        "hidden_states": _normal(2, 4, 2, 8, 8),
        "timestep": torch.tensor([0.3, 1.0]),
        "encoder_hidden_states": _normal(2, 5, 16),
    }


MODELS = {"unet": unet, "flux": flux, "video": video}
TARGETS = {
    "unet": ["to_q", "to_out.0", "conv_in", "proj_in"],
    "flux": ["to_q", "to_v", "to_out.0", "proj_out"],
    "video": ["to_q", "to_v", "to_out.0", "ffn.net.0.proj"],
}
COMPONENTS = {"unet": "unet", "flux": "transformer", "video": "transformer"}


def output(model, kind):
    given = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in inputs(kind).items()
    }
    with torch.no_grad():
        return model(**given, return_dict=False)[0]
