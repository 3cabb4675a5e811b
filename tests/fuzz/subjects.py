"""What is attacked: folders as they are written, and how each is read."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measures import assert_unchanged, snapshot, train
from mutation import joined, split
from safetensors.torch import load
from torch import nn

from lora_init import Calibration, LoraConfig, LoraModel, WithLoss, calibrate, get_peft_model
from lora_init.cache import Cache, key
from lora_init.calibration import file


class Subject:
    """One kind of folder.

    Attributes:
        kind: its name.
        intact: its files.
        refusals: the exceptions that a damaged folder may raise.
        expected: what the intact folder reads as.
    """

    kind: str
    refusals: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.write(folder)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.intact = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        self.prepare()
        self.renew()
        self.expected = self.read(folder)
        self.renew()

    def write(self, folder: Path) -> None:
        raise NotImplementedError

    def read(self, folder: Path) -> Mapping[str, Any] | None:
        """What is read, by name, or None where the folder counts as empty."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What `read` needs, once."""

    def renew(self) -> None:
        """Make whatever `read` changes afresh."""

    def change(self) -> str:
        """What a refusal changed, or an empty text."""
        return ""

    def seal(self, header: dict, payload: bytes) -> None:
        """Give a changed safetensors header the checksums that fit."""

    def equal(self, found: Mapping[str, Any]) -> bool:
        return found.keys() == self.expected.keys() and all(
            same(found[name], self.expected[name]) for name in found
        )

    def wrong(self, found: Mapping[str, Any]) -> str:
        """A tensor of another dtype or shape than expected, or an empty text."""
        for name, value in found.items():
            before = self.expected.get(name)
            if isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor):
                if (value.dtype, value.shape) != (before.dtype, before.shape):
                    return f"{name} is {value.dtype} of shape {tuple(value.shape)}"
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    return f"{name} is not finite"
        return ""


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


class Block(nn.Module):
    """Names as long as a transformer's: what makes a regular expression slow."""

    def __init__(self) -> None:
        super().__init__()
        self.query_projection, self.value_projection = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        return self.value_projection(torch.tanh(self.query_projection(x)))


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = ("encoder_layers_attention", "decoder_layers_attention")
        return nn.ModuleDict({name: nn.Sequential(Block()) for name in names})


def names_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


class Adapter(Subject):
    """A folder that `save_pretrained` wrote, read onto its base."""

    kind = "adapter"
    method: Any = "pissa"

    def write(self, folder: Path) -> None:
        config = LoraConfig(
            r=2, target_modules=["query_projection", "value_projection"],
            init_lora_weights=self.method, rank_pattern={"encoder.*query_projection": 3},
        )  # fmt: skip
        train(get_peft_model(network(), config)).save_pretrained(folder)

    def read(self, folder: Path) -> Mapping[str, Any]:
        model = LoraModel.from_pretrained(self.base, folder)
        found = dict(model.state_dict())
        for name, layer in model.layers.items():
            found |= {f"{name} scaling": layer.scaling, f"{name} weight": layer.weight.detach()}
        return found

    def wrong(self, found: Mapping[str, Any]) -> str:
        """A file without our header is PEFT's: twice the rank, the same effective weights."""
        effective = [name for name in found if name.endswith(" weight")]
        if any(not is_near(found[name], self.expected.get(name)) for name in effective):
            return super().wrong(found)
        factors = [name for name in found if ".lora_A" in name or ".lora_B" in name]
        return super().wrong({name: found[name] for name in found if name not in factors})

    def renew(self) -> None:
        self.base = network()
        self.base["encoder_layers_attention"].eval()
        self.before = snapshot(self.base)
        self.generators = generators()

    def change(self) -> str:
        if generators() != self.generators:
            self.generators = generators()
            return "a random state"
        try:
            assert_unchanged(self.base, self.before)
        except AssertionError as error:
            return f"{error!s:.80}"
        return ""


def is_near(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    if other is None or one.shape != other.shape:
        return False
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def generators() -> tuple:
    numpy_state = np.random.get_state()[1].tobytes()  # noqa: NPY002 - what libraries draw from
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy_state


class RequantizedAdapter(Adapter):
    """Ours with a base that was replaced: with quantizers and checksums."""

    kind = "adapter with a quantized base"
    method = "loftq"


class ForeignAdapter(Adapter):
    """As PEFT writes it: without a header of ours."""

    kind = "adapter of PEFT"
    method = True

    def write(self, folder: Path) -> None:
        super().write(folder)
        path = folder / "adapter_model.safetensors"
        header, payload = split(path.read_bytes())
        header["__metadata__"] = {"format": "pt"}
        path.write_bytes(joined(header, payload))


class CalibrationFile(Subject):
    """Moments and gradients of one network."""

    kind = "calibration"

    def write(self, folder: Path) -> None:
        model = network()["encoder_layers_attention"]
        batches = [torch.randn(20, 8, generator=torch.Generator().manual_seed(1))]
        data = WithLoss(batches, lambda model, batch: model(batch).square().mean())
        configs = {
            "moments.safetensors": ["eva", {"name": "corda", "corda_method": "kpm"}, "lora_ga"],
            "inputs.safetensors": ["eva"],
        }
        for name, methods in configs.items():
            chosen = [
                LoraConfig(r=2, target_modules=names_of(model), init_lora_weights=method)
                for method in methods
            ]
            calibrate(model, chosen, data).save(folder / name)

    def read(self, folder: Path) -> Mapping[str, Any]:
        found = {}
        for name in ("moments.safetensors", "inputs.safetensors"):
            tensors, metadata = Calibration.load(folder / name).to_tensors()
            found |= {f"{name} {key}": tensor for key, tensor in tensors.items()}
            found[name] = metadata
        return found

    def seal(self, header: dict, payload: bytes) -> None:
        texts = header.get("__metadata__", {})
        try:
            tensors = load(joined(header, payload))
            checksum = file._checksum(texts[file.HEADER_KEY], tensors)
        except Exception:
            return  # no checksum makes a file of this header
        texts[file.CHECKSUM_KEY] = checksum

    def wrong(self, found: Mapping[str, Any]) -> str:
        """Another shape, with a checksum that fits, is another calibration."""
        for name, value in found.items():
            if isinstance(value, torch.Tensor):
                part = name.rpartition(".")[2]
                wanted = {"mean": (torch.float64,), "covariance": (torch.float32, torch.float64)}
                if value.dtype not in wanted.get(part, (torch.float32,)):
                    return f"{name} is {value.dtype}"
                if value.ndim != (1 if part == "mean" else 2) or not value.isfinite().all():
                    return f"{name} of shape {tuple(value.shape)}"
        return ""


class CacheFolder(Subject):
    """A cache with entries of two keys. Nothing in it may raise or hang: damage is a miss."""

    kind = "cache"
    refusals = ()
    keys = (key("fuzz", 1, "a"), key("fuzz", 1, "b"))

    def write(self, folder: Path) -> None:
        for name in self.keys:
            tensors = {"lora_A": torch.randn(4, 6), "lora_B": torch.randn(5, 4)}
            Cache(folder, 10**9).put(name, tensors, {"residual": 0.5})

    def read(self, folder: Path) -> Mapping[str, Any] | None:
        store = Cache(folder, 10**9)
        found = {}
        for number, name in enumerate(self.keys):
            entry = store.get(name)
            if entry is not None:
                found |= {f"{number} {part}": tensor for part, tensor in entry.tensors.items()}
                found[f"{number} metadata"] = entry.metadata
            store.put(name, {"lora_A": torch.zeros(4, 6)}, {})
        store.usage()
        return found if len(found) == 6 else None

    def wrong(self, found: Mapping[str, Any]) -> str:
        """Other values than those that were stored are wrong, too."""
        return super().wrong(found) or ("" if self.equal(found) else "another value")


SUBJECTS: dict[str, type[Subject]] = {
    subject.kind: subject
    for subject in (Adapter, RequantizedAdapter, ForeignAdapter, CalibrationFile, CacheFolder)
}
