"""Original weights, read from safetensors one layer at a time.

Methods that decompose W, or make up for what a quantiser loses, want the weight from before it was
quantised. The model in memory holds it no more; its checkpoint does. A read opens the file, maps
one tensor and closes it: no more than one weight is in memory, and an `OriginalWeights` can be
copied and pickled like any other value.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEADER_DTYPES = ("F32", "BF16", "F16", "F64")  # the same, as a file's header calls them
# What quantisers store beside a weight or in its place, after the module's name.
QUANTISED = (
    ".qweight",
    ".weight_packed",
    ".SCB",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight.absmax",
    ".weight.quant_state.bitsandbytes__nf4",
    ".weight.quant_state.bitsandbytes__fp4",
)
CONVERT = (
    "convert it once, AutoModel.from_pretrained(folder).save_pretrained(new_folder), and pass the "
    "new folder"
)


class OriginalWeights:
    """The unquantised weights of a model, by the names of its modules.

    A module's tensor is the one stored under its name + ".weight". Where there is none, names are
    compared from their ends: one of the two may have a prefix more, of whole dotted parts, so that
    "model.layers.0.up" finds "layers.0.up" and the other way round. A wrapper's "base_model." does
    not count. The match must be unique. It says nothing of other modules: two may find the same
    tensor, which is right for tied weights only (compare their `key`).

    Args:
        source: a folder in Hugging Face's layout (`model.safetensors`, or
            `model.safetensors.index.json` and its shards; else every `*.safetensors` in it), one
            `.safetensors` file, or a mapping of names to tensors, such as a state dict. No tensor
            is read here, only headers and the index.

    Raises:
        FileNotFoundError: no such path, no safetensors in the folder, or a shard is missing.
        ValueError: another kind of file, a damaged one, or a tensor that two files hold.
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
                f"original_weights is of type {type(source).__name__}; allowed are a folder, a "
                ".safetensors file, or a mapping of names to tensors such as model.state_dict()"
            )
        # By the last part of the module's name, which any two names that match have in common.
        self._keys: dict[str, list[str]] = {}
        for key in self._stored:
            if isinstance(key, str) and key.endswith(".weight"):
                self._keys.setdefault(_last_part(key), []).append(key)

    def weight(self, name: str) -> Tensor:
        """The weight of module `name`, in its stored dtype and orientation.

        Raises:
            ValueError: none or several match, it is not float, or the file is damaged.
        """
        key = self.key(name)
        self._check(name, key)
        stored = self._stored[key]
        if isinstance(stored, Tensor):
            return stored.detach()
        with _opened(stored) as file:
            return file.get_tensor(key)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `weight(name)`; reads the header only.

        Raises:
            ValueError: as `weight`.
        """
        key = self.key(name)
        return self._check(name, key)

    def has(self, name: str) -> bool:
        """Whether exactly one stored tensor, of any dtype, matches module `name`."""
        return len(self._matches(name)) == 1

    def key(self, name: str) -> str:
        """The name under which the weight of module `name` is stored.

        Raises:
            ValueError: none or several match.
        """
        matches = self._matches(name)
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ValueError(
                f"original_weights: the weight of {name!r} could be any of {_listed(matches)} in "
                f"{self.source}; pass a checkpoint with the model's own names"
            )
        self._check_quantised(name, _bare(name))
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
        for exact in (f"{name}.weight", f"{_bare(name)}.weight"):
            if exact in self._stored:
                return [exact]
        ours = f".{_bare(name)}.weight"
        return [
            key
            for key in self._keys.get(_last_part(ours), [])
            if f".{key}".endswith(ours) or ours.endswith(f".{key}")
        ]

    def _check(self, name: str, key: str) -> tuple[int, ...]:
        """Refuse what is not an unquantised weight; return the shape."""
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
                f"{'on the meta device' if isinstance(stored, Tensor) else type(stored)}; allowed "
                "are tensors with data, as model.state_dict() of a loaded model holds"
            )
        # First what lies beside it: packed codes can be stored in a float dtype (quant_storage).
        self._check_quantised(name, key.removesuffix(".weight"))
        if dtype not in DTYPES and dtype not in HEADER_DTYPES:
            raise _quantised(name, f"{self.source} holds {key!r} as {dtype}")
        return tuple(shape)

    def _check_quantised(self, name: str, module: str) -> None:
        for ending in QUANTISED:
            if module + ending in self._stored:
                raise _quantised(name, f"{self.source} holds {module + ending!r}")


def _quantised(name: str, finding: str) -> ValueError:
    return ValueError(
        f"original_weights: the weight of {name!r} is quantised already, {finding}; allowed are "
        f"{', '.join(str(dtype)[6:] for dtype in DTYPES)}. Pass the checkpoint from before the "
        "quantisation"
    )


def _files(path: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    if path.suffix == ".safetensors" and path.is_file():
        return _headers([path])
    if path.is_file():
        raise ValueError(
            f"original_weights: {str(path)!r} is no .safetensors file, and no other kind is read "
            f"(a pickle never is); pass the model's folder, or {CONVERT}"
        )
    if not path.is_dir():
        raise FileNotFoundError(
            f"original_weights: no file or folder {str(path)!r}; allowed are local paths (of a "
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
                f"{str(path.parent)!r} both hold {twice[0]!r}; pass the one file that is meant"
            )
        files |= dict.fromkeys(keys, path)
    return files


def _index(index: Path) -> dict[str, Path]:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {key: index.parent / shard for key, shard in shards.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"original_weights: {index} is damaged ({error!r}); allowed is a JSON object whose "
            "'weight_map' gives each tensor's file. Download it again"
        ) from error
    # By the names alone: a cache of downloads has links to files elsewhere in these places.
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
    """Whether a file's name, as an index has it, stays in the folder of the index."""
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


def _bare(name: str) -> str:
    return name.removeprefix("base_model.")


def _last_part(key: str) -> str:
    return key.removesuffix(".weight").rpartition(".")[2]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
