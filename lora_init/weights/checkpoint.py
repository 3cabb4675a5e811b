"""Original, unquantized weights, read from safetensors one layer at a time.

Methods that decompose W or correct a quantization error need the weight from before quantization.
The checkpoint has it; the quantized model does not. Each read opens the file, maps one tensor and
closes the file. At most one weight is in memory, and an `OriginalWeights` can be copied and
pickled.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_init.weights.mxfp4 import mxfp4_values
from lora_init.weights.single_experts import former_names, present_name, single_experts

if TYPE_CHECKING:
    from lora_init.plan.plan import Target

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEADER_DTYPES = ("F32", "BF16", "F16", "F64")  # the names of DTYPES in a safetensors header
# Suffixes of the tensors that quantizers store next to a weight or instead of it.
QUANTIZED = (
    ".qweight",
    ".weight_packed",
    ".SCB",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight.absmax",
    ".weight.quant_state.bitsandbytes__nf4",
    ".weight.quant_state.bitsandbytes__fp4",
)
BLOCKS, SCALES = "_blocks", "_scales"
"""Endings of the two tensors that hold a parameter in MXFP4, as gpt-oss is published."""

CONVERT = (
    "convert it once, AutoModel.from_pretrained(folder).save_pretrained(new_folder), and pass the "
    "new folder"
)


class OriginalWeights:
    """The unquantized weights of a model, by module name.

    A module's weight is the tensor named after the module plus ".weight". If there is none, one of
    the two names may have an extra prefix of whole dotted parts: "model.layers.0.up" matches
    "layers.0.up" and vice versa. A prefix "base_model." is ignored. The match must be unique. Two
    modules can match the same tensor, which is right for tied weights only (compare their `key`).
    A fused parameter of experts also matches the tensors of its single experts, and those of MXFP4
    codes, from which its values are computed.

    Args:
        source: a folder in Hugging Face's layout, one `.safetensors` file, or a mapping of names to
            tensors, such as a state dict. A folder holds `model.safetensors`, or
            `model.safetensors.index.json` and its shards, or else any `*.safetensors` files. Only
            headers and the index are read here.

    Raises:
        FileNotFoundError: the path does not exist, the folder has no safetensors, or a shard is
            missing.
        ValueError: the file is damaged or of another format, or two files hold the same tensor.
        TypeError: `source` is neither a path nor a mapping.

    Examples:
        >>> original = OriginalWeights({"layers.0.up.weight": torch.ones(3, 2)})
        >>> original.key("model.layers.0.up"), original.shape("model.layers.0.up")
        ('layers.0.up.weight', (3, 2))
    """

    def __init__(self, source: str | os.PathLike | Mapping[str, Tensor]) -> None:
        if isinstance(source, Mapping):
            self.source = f"the mapping of {len(source)} tensors"
            self._stored: Mapping[str, Path | Tensor] = source
        elif isinstance(source, str | os.PathLike):
            self.source = str(source)
            self._stored = _files(Path(source).expanduser())
        else:
            raise TypeError(
                f"original_weights is of type {type(source).__name__}; it must be a folder, a "
                ".safetensors file, or a mapping of names to tensors such as model.state_dict()"
            )
        # By the last part of the module's name, which two matching names always share.
        self._keys: dict[str, list[str]] = {}
        for key in self._stored:
            if isinstance(key, str) and key.endswith(".weight"):
                self._keys.setdefault(_last_part(key), []).append(key)
        names = [key for key in self._stored if isinstance(key, str)]
        self._experts = single_experts(names)
        packed = [key.removesuffix(BLOCKS) for key in names if key.endswith(BLOCKS)]
        self._packed = [name for name in packed if name + SCALES in self._stored]

    def weight(self, name: str, expert: int | None = None) -> Tensor:
        """The weight of module `name`, in its stored dtype and layout; bfloat16 for MXFP4 codes.

        Args:
            name: the name of a module, or of a fused parameter of experts.
            expert: the number of the expert whose matrix alone is read.

        Raises:
            ValueError: no tensor or several match, it is not float, or the file is damaged.
        """
        tensors = self._single_experts(name)
        if tensors and expert is None:
            return torch.stack([self.weight(name, number) for number in range(len(tensors))])
        if tensors and expert is not None:
            rows = [self._tensor(name, key) for key in tensors[expert]]
            return rows[0] if len(rows) == 1 else torch.cat(rows)
        key = self.key(name)
        if not self._is_packed(key):
            return self._tensor(name, key, expert)
        codes = self._tensor(name, key, expert)
        scales = self._tensor(name, key.removesuffix(BLOCKS) + SCALES, expert)
        # transformers stores these experts as (in, out). bfloat16 holds every value exactly.
        return mxfp4_values(codes, scales).mT.to(torch.bfloat16)

    def _is_packed(self, key: str) -> bool:
        """Whether the tensor holds the codes or the scales of MXFP4."""
        return key.removesuffix(BLOCKS).removesuffix(SCALES) in self._packed

    def _tensor(self, name: str, key: str, expert: int | None = None) -> Tensor:
        self._check(name, key)
        stored = self._stored[key]
        if isinstance(stored, Tensor):
            return stored.detach() if expert is None else stored.detach()[expert]
        with _opened(stored) as file:
            return file.get_tensor(key) if expert is None else file.get_slice(key)[expert]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `weight(name)`; reads only the header.

        Raises:
            ValueError: as `weight`.
        """
        tensors = self._single_experts(name)
        if not tensors:
            key = self.key(name)
            shape = self._check(name, key)
            if self._is_packed(key):
                *stack, rows, blocks, size = shape
                return (*stack, 2 * blocks * size, rows)
            return shape
        shapes = {tuple(self._check(name, key) for key in keys) for keys in tensors}
        if len(shapes) > 1:
            raise ValueError(
                f"original_weights: the experts of {name!r} have different shapes in {self.source};"
                " pass the checkpoint of this model"
            )
        (parts,) = shapes
        return len(tensors), sum(part[0] for part in parts), *parts[0][1:]

    def has(self, name: str) -> bool:
        """Whether exactly one stored tensor, of any dtype, matches module `name`."""
        return len(self._matches(name)) == 1

    def key(self, name: str) -> str:
        """The name under which the weight of module `name` is stored.

        Of a fused parameter that is stored as single experts, it is the first expert's tensor.

        Raises:
            ValueError: no tensor or several match.
        """
        matches = self._matches(name)
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ValueError(
                f"original_weights: the weight of {name!r} could be any of {_listed(matches)} in "
                f"{self.source}; pass a checkpoint with this model's names"
            )
        self._check_quantized(name, _bare(name))
        every = [key for keys in self._keys.values() for key in keys]
        modules = [key.removesuffix(".weight") for key in self._keys.get(_last_part(name), every)]
        near = difflib.get_close_matches(_bare(name), modules, n=3, cutoff=0.5)
        raise ValueError(
            f"original_weights: {self.source} holds no weight for {name!r}; "
            f"{f'the nearest are {_listed(near)}' if near else f'it holds {len(every)} others'}. "
            "Pass the checkpoint that the model was made from (of tied weights it may hold only "
            "one, under the other module's name)"
        )

    def _matches(self, name: str) -> list[str]:
        # A fused parameter of experts has its own name in the checkpoint.
        for exact in (f"{name}.weight", f"{_bare(name)}.weight", name, _bare(name)):
            if exact in self._stored:
                return [exact]
        if packed := [one for one in self._packed if _agree(one, f".{_bare(name)}")]:
            return [one + BLOCKS for one in packed]
        ours = f".{_bare(name)}.weight"
        stored = self._keys.get(_last_part(ours), [])
        found = [key for key in stored if _agree(key, ours)]
        found = found or [key for key in stored if _agree(present_name(key), ours)]
        found = found or [
            key
            for former in former_names(_bare(name))
            for key in self._keys.get(_last_part(former), ())
            if _agree(key, f".{former}.weight")
        ]
        return found or [self._experts[fused][0][0] for fused in self._fused(name)]

    def _fused(self, name: str) -> list[str]:
        return [fused for fused in self._experts if _agree(fused, f".{_bare(name)}")]

    def _single_experts(self, name: str) -> list[tuple[str, ...]]:
        """The tensors of each expert, if the parameter is stored as such; else none."""
        fused = self._fused(name)
        if len(fused) != 1 or self._matches(name) != [self._experts[fused[0]][0][0]]:
            return []
        return self._experts[fused[0]]

    def _check(self, name: str, key: str) -> tuple[int, ...]:
        """Raise if a tensor is not an unquantized weight; return its shape."""
        stored = self._stored[key]
        if isinstance(stored, Path):
            with _opened(stored) as file:
                entry = file.get_slice(key)
                shape, dtype = entry.get_shape(), entry.get_dtype()
        elif isinstance(stored, Tensor) and not stored.is_meta:
            shape, dtype = stored.shape, stored.dtype
        else:
            raise ValueError(
                f"original_weights[{key!r}] is "
                f"{'on the meta device' if isinstance(stored, Tensor) else type(stored)}; it must "
                "be a tensor with data, as in model.state_dict() of a loaded model"
            )
        # Check the suffixes first: packed codes can have a float dtype (quant_storage).
        self._check_quantized(name, key.removesuffix(".weight"))
        if self._is_packed(key) and dtype in (torch.uint8, "U8"):
            return tuple(shape)
        if dtype not in DTYPES and dtype not in HEADER_DTYPES:
            raise _quantized(name, f"{self.source} holds {key!r} as {dtype}")
        return tuple(shape)

    def _check_quantized(self, name: str, module: str) -> None:
        for ending in QUANTIZED:
            if module + ending in self._stored:
                raise _quantized(name, f"{self.source} holds {module + ending!r}")


def stored_name(originals: OriginalWeights, target: Target) -> str:
    """The module name under which a weight is stored; tied weights may use another name."""
    own = target.name if target.expert is None else target.name.rpartition(".")[0]
    names = (own, *(name.removesuffix(".weight") for name in target.shared_with))
    return next((name for name in names if originals.has(name)), own)


def _quantized(name: str, finding: str) -> ValueError:
    return ValueError(
        f"original_weights: the weight of {name!r} is quantized already, {finding}; must be one of "
        f"{', '.join(str(dtype)[6:] for dtype in DTYPES)}. Pass the checkpoint from before the "
        "quantization"
    )


def _files(path: Path) -> dict[str, Path]:
    """The file of each tensor, by tensor name."""
    if path.suffix == ".safetensors" and path.is_file():
        return _headers([path])
    if path.is_file():
        raise ValueError(
            f"original_weights: {str(path)!r} is not a .safetensors file, and other formats are "
            f"not supported (pickles are never read); pass the model's folder, or {CONVERT}"
        )
    if not path.is_dir():
        raise FileNotFoundError(
            f"original_weights: no file or folder {str(path)!r}; it must be a local path (for a "
            "model on the hub: the folder that huggingface_hub.snapshot_download returns)"
        )
    if (path / WEIGHTS).is_file():
        return _headers([path / WEIGHTS])
    if (path / INDEX).is_file():
        return _index(path / INDEX)
    if found := sorted(path.glob("*.safetensors")):
        return _headers(found)
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    held = f"{pickles[0]!r} is a pickle, which is never loaded: {CONVERT}" if pickles else ""
    raise FileNotFoundError(
        f"original_weights: no {WEIGHTS}, {INDEX} or other .safetensors file in {str(path)!r}; "
        f"{held or 'pass the folder that holds them'}"
    )


def _headers(paths: list[Path]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in paths:
        with _opened(path) as file:
            keys = list(file.keys())
        if twice := [key for key in keys if key in files]:
            raise ValueError(
                f"original_weights: {files[twice[0]].name!r} and {path.name!r} in "
                f"{str(path.parent)!r} both hold {twice[0]!r}; pass the right one of the files"
            )
        files |= dict.fromkeys(keys, path)
    return files


def _index(index: Path) -> dict[str, Path]:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {key: index.parent / shard for key, shard in shards.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"original_weights: {index} is damaged ({error!r}); it must be a JSON object whose "
            "'weight_map' gives each tensor's file. Download it again"
        ) from error
    # Compare names, not resolved paths: in a download cache they are links to other folders.
    if outside := sorted({shard for shard in shards.values() if not _is_inside(shard)}):
        raise ValueError(
            f"original_weights: {index} names {_listed(outside)}, outside of its folder; an index "
            "must name files in its folder. Download it again"
        )
    if missing := sorted({file.name for file in files.values() if not file.is_file()}):
        raise FileNotFoundError(
            f"original_weights: {index} names {_listed(missing)}, not in the folder; download the "
            "missing files"
        )
    return files


def _is_inside(shard: str) -> bool:
    """Whether a file name in an index stays inside the folder of the index."""
    shard = shard.replace("\\", "/")
    return not PurePosixPath(shard).is_absolute() and ".." not in shard.split("/")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"original_weights: {path} is damaged ({error}); a download that was cut short, or a "
            "Git LFS pointer in the file's place? Download it again"
        ) from error


def _agree(key: str, ours: str) -> bool:
    """Whether a stored name and a name that begins with a dot differ by a prefix only."""
    return f".{key}".endswith(ours) or ours.endswith(f".{key}")


def _bare(name: str) -> str:
    return name.removeprefix("base_model.")


def _last_part(key: str) -> str:
    return key.removesuffix(".weight").rpartition(".")[2]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
