"""The layers of an adapter file, without its base model.

`read_layers` serves the commands that inspect and convert adapters. A file of this package for a
replaced base also contains the recipe of that base, and is not supported here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from lora_init.adapters.attention_keys import ATTENTION_OUTPUT
from lora_init.adapters.expert_layout import from_file, named, to_file
from lora_init.adapters.format import OWN_WEIGHTS_NAME, PREFIX, WEIGHTS_NAME
from lora_init.adapters.keys import without_adapter_name
from lora_init.adapters.load import read_tensors
from lora_init.config.file import CONFIG_NAME, read_json
from lora_init.config.lora_config import LoraConfig
from lora_init.files import write_atomically
from lora_init.plan.match import PatternValues, name_matches
from lora_init.weights.experts import DOWN, FIRST

FUSED = (*FIRST, DOWN)
PARTS = ("lora_A", "lora_B")
FACTORS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
)


@dataclass(frozen=True)
class FileLayer:
    """The factors of one adapted layer in a file.

    Attributes:
        name: the module's name in the file; for experts, that of the fused parameter.
        lora_A, lora_B: the factors as stored: (r, in) and (out, r); with kernel sizes for
            convolutions; for E experts (E r, in) and (out, r E).
        expected_rank: the rank that the configuration states for this layer.
        alpha: the alpha that the configuration states.
        scaling: s as PEFT computes it, alpha / r or alpha / sqrt(r).
        keys: the keys of both tensors in the file.
        experts: the number of experts of a fused parameter; None for one matrix.
    """

    name: str
    lora_A: Tensor
    lora_B: Tensor
    expected_rank: int
    alpha: float
    scaling: float
    keys: tuple[str, str]
    experts: int | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0] // (self.experts or 1)

    def single(self) -> list[FileLayer]:
        """The layers of the single experts; the layer itself if it has one matrix."""
        if self.experts is None:
            return [self]
        stacks = (from_file(part, getattr(self, part), self.experts) for part in PARTS)
        return [
            dataclasses.replace(self, lora_A=lora_A, lora_B=lora_B, experts=None)
            for lora_A, lora_B in zip(*stacks, strict=True)
        ]

    def joined(self, layers: Sequence[FileLayer]) -> FileLayer:
        """The inverse of `single`, for layers that all have the same rank."""
        if self.experts is None:
            return layers[0]
        lora_A, lora_B = (
            to_file(part, torch.stack([getattr(layer, part) for layer in layers])) for part in PARTS
        )
        return dataclasses.replace(layers[0], lora_A=lora_A, lora_B=lora_B, experts=len(layers))

    @property
    def is_embedding(self) -> bool:
        return self.keys[0].endswith("lora_embedding_A")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the product B A."""
        return self.lora_B.shape[0], self.lora_A.flatten(1).shape[1]

    def cores(self) -> tuple[Tensor, Tensor, Tensor]:
        """The thin SVD of s B A in float64, from QR decompositions of B and Aᵀ.

        Returns:
            U (out, k), the singular values (k,), and V (in, k), with k <= r.
        """
        left, upper = torch.linalg.qr(self.lora_B.flatten(1).double())
        right, lower = torch.linalg.qr(self.lora_A.flatten(1).double().T)
        u, values, vt = torch.linalg.svd(self.scaling * upper @ lower.T, full_matrices=False)
        return left @ u, values, right @ vt.T

    def noise(self) -> float:
        """A bound on the singular values that rounding of the factors to float32 can cause."""
        norms = (torch.linalg.vector_norm(part.double()) for part in (self.lora_A, self.lora_B))
        return torch.finfo(torch.float32).eps * self.scaling * float(torch.tensor([*norms]).prod())

    def with_factors(
        self, lora_A: Float[Tensor, "rank in"], lora_B: Float[Tensor, "out rank"], alpha: float
    ) -> FileLayer:
        """The layer with factors of another rank but its scaling, in the shapes of the file."""
        rank = lora_A.shape[0]
        return dataclasses.replace(
            self,
            lora_A=lora_A.to(self.lora_A.dtype).reshape(rank, *self.lora_A.shape[1:]),
            lora_B=lora_B.to(self.lora_B.dtype).reshape(-1, rank, *self.lora_B.shape[2:]),
            expected_rank=rank,
            alpha=alpha,
        )


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter's folder.

    Attributes:
        config: the configuration in the folder.
        layers: the adapted layers, by name.
        others: all other tensors: magnitudes, biases and fully trained modules.
        method: the start that this package recorded; None for a file of PEFT.
        is_own: other programs do not read the file, since their layers compute something else.
    """

    config: LoraConfig
    layers: dict[str, FileLayer]
    others: dict[str, Tensor]
    method: str | None
    is_own: bool = False


def read_layers(folder: Path) -> AdapterFile:
    """Read an adapter's folder.

    Raises:
        FileNotFoundError: the configuration or the safetensors file is missing.
        ValueError: a file is damaged, one factor of a layer is missing, or the adapter belongs to a
            replaced base.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}: must be the folder of an adapter")
    read_json(folder / CONFIG_NAME)
    config = LoraConfig.from_pretrained(folder)
    tensors, header = read_tensors(folder)
    if (folder / OWN_WEIGHTS_NAME).is_file() and header is not None and "quantizers" in header:
        raise ValueError(
            f"{folder} belongs to a quantized base that lora_init computes again from the original "
            "weights, which is not supported here. Load it with LoraModel.from_pretrained."
        )
    tensors = without_adapter_name(tensors)
    layers = {layer.name: layer for layer in _layers(config, tensors)}
    if not layers:
        raise ValueError(f"{folder} contains no lora_A: it is damaged or not a LoRA adapter")
    used = {key for layer in layers.values() for key in layer.keys}
    others = {key: value for key, value in tensors.items() if key not in used}
    method = header["method"]["name"] if header is not None else None
    is_own = (folder / OWN_WEIGHTS_NAME).is_file()
    return AdapterFile(config, layers, others, method, is_own)


def _layers(config: LoraConfig, tensors: Mapping[str, Tensor]) -> Iterable[FileLayer]:
    ranks = PatternValues("rank_pattern", config.rank_pattern, config.r)
    alphas = PatternValues("alpha_pattern", config.alpha_pattern, config.lora_alpha)
    for shown, key in _named_keys(config, tensors).items():
        lora_A = tensors[key]
        for first, second in FACTORS:
            if not key.endswith(first):
                continue
            name = shown.removeprefix(PREFIX).removesuffix(first)
            other = key.removesuffix(first) + second
            if other not in tensors:
                raise ValueError(f"the adapter file lacks {other!r}: it is damaged or incomplete")
            selected = name.removesuffix(ATTENTION_OUTPUT)
            lora_B, rank, alpha = tensors[other], ranks(selected), alphas(selected)
            if lora_A.ndim > 2 and lora_B.shape[1] < len(lora_A):
                raise ValueError(
                    f"{name!r} is a convolution with groups={len(lora_A) // lora_B.shape[1]}, "
                    "which is not supported here. Load the adapter with LoraModel.from_pretrained."
                )
            if lora_B.shape[1] != lora_A.shape[0]:
                raise ValueError(
                    f"{name!r}: lora_A has rank {lora_A.shape[0]} and lora_B {lora_B.shape[1]} in "
                    "the adapter file, which is damaged"
                )
            scaling = config.scaling(rank, alpha)
            experts = None
            if any(name_matches(name, entry) for entry in _parameters(config)):
                experts, rest = divmod(len(lora_A), rank)
                if rest:
                    raise ValueError(
                        f"{name!r}: lora_A has {len(lora_A)} rows in the adapter file, which must "
                        f"be a multiple of the rank {rank} that adapter_config.json states"
                    )
            yield FileLayer(name, lora_A, lora_B, rank, alpha, scaling, (key, other), experts)


def _named_keys(config: LoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The keys of a file, by keys that have the names of fused parameters."""
    entries = _parameters(config)
    return named({key: key for key in tensors}, entries, entries)


def _parameters(config: LoraConfig) -> list[str]:
    """The fused parameters of experts that a file adapts, by their ends.

    Without a model, an entry such as "down_proj" is taken for a parameter of a module `experts`.
    """
    entries = config.target_parameters
    found = [e for e in entries if e.endswith(FUSED)] if isinstance(entries, list) else []
    return [entry if "." in entry else f"experts.{entry}" for entry in found]


def write_plain(
    folder: Path,
    config: LoraConfig,
    layers: Iterable[FileLayer],
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder as PEFT would, for a base that is not changed; each file atomically.

    Args:
        folder: the folder to write, which is created if needed.
        config: the configuration to write.
        layers: the adapted layers.
        others: the other tensors of the file, by key.
    """
    tensors = dict(others or {})
    for layer in layers:
        tensors |= dict(zip(layer.keys, (layer.lora_A, layer.lora_B), strict=True))
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / WEIGHTS_NAME,
        lambda path: save_file(tensors, path, metadata={"format": "pt"}),
        last=lambda: (folder / CONFIG_NAME).unlink(missing_ok=True),
    )
    text = config.to_json()
    write_atomically(folder / CONFIG_NAME, lambda path: path.write_text(text))
    (folder / OWN_WEIGHTS_NAME).unlink(missing_ok=True)
