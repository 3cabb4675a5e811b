"""From Hydra's composition to the application's own dataclass: OmegaConf ends here."""

from __future__ import annotations

from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import ConfigurationError

Settings = TypeVar("Settings")


def as_settings(composed: DictConfig, kind: type[Settings]) -> Settings:
    """The composition as `kind`, the dataclass that its schema was made of, or a subclass.

    Raises:
        ConfigurationError: a mandatory setting left out, or a value that its dataclass refuses.
    """
    for key in sorted(OmegaConf.missing_keys(composed)):
        raise ConfigurationError(f"{key} is not set; give it on the command line as {key}=…")
    try:
        settings = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigurationError(str(error).splitlines()[0]) from error
    except (ValueError, TypeError) as error:  # from a __post_init__
        raise ConfigurationError(str(error)) from error
    assert isinstance(settings, kind)
    return settings
