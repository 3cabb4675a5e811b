"""The base that belongs to an adapter of rank r: W - s B0 A0, or the quantized weight.

The checkpoint is read and written one tensor at a time per file, and one file at a time. A file
that was written completely is not written again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_init import LoraConfig, LoraModel
from lora_init.adapters.file_layers import FileLayer, write_plain
from lora_init.adapters.format import PREFIX
from lora_init.adapters.save import exported_config
from lora_init.files import write_atomically
from lora_init.linalg import frobenius_norm
from lora_init.linalg.matrix import widened
from lora_init.plan.plan import Target
from lora_init.progress import tracked
from lora_init.weights.checkpoint import OriginalWeights
from lora_init.weights.kinds import FORMATS

RESIDUAL_FOLDER = "base"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ERRORS = "lora_init_residual.json"
"""The rounding errors of the files that are finished, by layer."""


def write_residual(
    out: Path, folder: Path, model: LoraModel, config: LoraConfig, dtype: str | None
) -> dict[str, float]:
    """Write the adapter of rank r to `out` and its base to `out/base`.

    Args:
        out: the folder of the adapter.
        folder: the checkpoint of the original base.
        model: the initialized model.
        config: the settings of the adapter.
        dtype: the dtype of the base's weights; None for the stored ones.

    Returns:
        By layer, ‖round(W') - W'‖ / ‖W‖ for the new weight W' (Frobenius norms).

    Raises:
        ValueError: an adapted weight is tied to another one, which the edit would change too; or
            experts are adapted.
    """
    tied = next((target for target in model.plan.targets if target.shared_with), None)
    if tied is not None:
        raise ValueError(
            f"--residual is not supported with the adapted layer {tied.name!r}, which shares its "
            f"weight with {tied.shared_with[0]!r}: exclude it with --exclude-modules"
        )
    routed = (t for t in model.plan.targets if FORMATS[t.module_type].operation == "routed")
    if (experts := next(routed, None)) is not None:
        raise ValueError(
            f"--residual is not supported with {experts.name!r}, a fused weight of experts: leave "
            "experts out with --no-experts, or leave --residual out"
        )
    base = out / RESIDUAL_FOLDER
    base.mkdir(parents=True, exist_ok=True)
    weights = OriginalWeights(folder)
    targets = {weights.key(target.name): target for target in model.plan.targets}
    errors: dict[str, float] = {}
    if (base / ERRORS).is_file():
        errors = json.loads((base / ERRORS).read_text())
    files = sorted(folder.glob("*.safetensors"))
    for path in tracked(files, "residual base"):
        if (base / path.name).is_file():
            continue
        tensors, found = _rewritten(path, targets, model, None if dtype is None else DTYPES[dtype])
        errors |= found
        text = json.dumps(errors)
        write_atomically(base / ERRORS, lambda place, text=text: place.write_text(text))
        write_atomically(
            base / path.name,
            lambda place, tensors=tensors: save_file(tensors, place, metadata={"format": "pt"}),
        )
    for path in folder.iterdir():
        if path.is_file() and path.suffix in (".json", ".model", ".txt", ".jinja"):
            _copy(path, base, dtype)
    _write_adapter(out, base, model, config)
    (base / ERRORS).unlink()
    return errors


def _rewritten(
    path: Path, targets: Mapping[str, Target], model: LoraModel, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            stored = file.get_tensor(key)
            wanted = stored.dtype if dtype is None or not stored.is_floating_point() else dtype
            if key not in targets:
                tensors[key] = stored.to(wanted)
                continue
            target = targets[key]
            new = _new_weight(stored, target, model)
            tensors[key] = new.to(wanted).contiguous()
            norm = frobenius_norm(widened(stored).flatten(1))
            error = frobenius_norm(widened(tensors[key]).flatten(1) - new.flatten(1))
            errors[target.name] = float(error / norm) if norm > 0 else 0.0
    return tensors, errors


def _new_weight(stored: Tensor, target: Target, model: LoraModel) -> Tensor:
    """The weight to which the initial factors are added, in float32 and in the stored layout."""
    layer, one = model.layers[target.name], FORMATS[target.module_type]
    weight = widened(one.orient(stored))
    replacement = model.replacements.get(target.name)
    if replacement is not None:
        new = replacement.base(weight, target.scaling)
    else:
        new = weight - layer.initial_product().to(weight.device)
    return one.stored(layer.base_layer, new)


def _copy(path: Path, base: Path, dtype: str | None) -> None:
    """Copy a file of the checkpoint; config.json gets the new dtype."""
    if path.name != "config.json" or dtype is None:
        shutil.copyfile(path, base / path.name)
        return
    values = json.loads(path.read_text())
    for name in ("dtype", "torch_dtype"):
        if name in values:
            values[name] = dtype
    (base / path.name).write_text(json.dumps(values, indent=2))


def _write_adapter(out: Path, base: Path, model: LoraModel, config: LoraConfig) -> None:
    """Write the factors at step 0 as a plain adapter of rank r."""
    written = exported_config(config, model.plan, doubled=False)
    written.base_model_name_or_path = str(base.resolve())
    layers = []
    for target in model.plan.targets:
        layer = model.layers[target.name]
        keys = (
            f"{PREFIX}{target.name}.lora_A.weight",
            f"{PREFIX}{target.name}.lora_B.weight",
        )
        layers.append(
            FileLayer(
                target.name,
                layer.lora_A.detach(),
                layer.lora_B.detach(),
                target.rank,
                target.alpha,
                target.scaling,
                keys,
            )
        )
    write_plain(out, written, layers)
