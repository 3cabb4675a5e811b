"""Any model that transformers' Auto classes load: a local folder, or a name on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from ..config.bounds import check_path, check_switches
from ..config.inputs import ModelConfig
from ..errors import ConfigurationError
from .source import Checkpoint


@dataclass
class LocalModel(ModelConfig):
    """Where the model is.

    Attributes:
        path: a folder with config.json, or a hub name such as `organisation/model`.
        revision: the hub revision.
        trust_remote_code: run the model's own Python code.
        notes: written into every result.
    """

    name: str = "local"
    path: str = MISSING
    revision: str | None = None
    trust_remote_code: bool = False
    notes: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("model.path", self.path)
        check_switches("model.", self, "trust_remote_code")


def locate(config: LocalModel) -> Checkpoint:
    folder = Path(config.path).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ConfigurationError(
                f"model.path={config.path!r}: {folder.resolve()} has no config.json; give the "
                "folder that `save_pretrained` wrote"
            )
        source = str(folder)
    elif config.path.startswith(("/", ".", "~")) or config.path.count("/") > 1:
        raise ConfigurationError(
            f"model.path={config.path!r}: no such folder (looked at {folder.resolve()}); give an "
            "existing folder, or a hub name such as organisation/model"
        )
    else:
        source = config.path
    return Checkpoint(source, config.revision, config.trust_remote_code, tuple(config.notes or ()))
