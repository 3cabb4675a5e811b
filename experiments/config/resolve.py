"""The way from Hydra's composition to the application's dataclass: OmegaConf ends here."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass
from typing import TypeVar

from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from ..errors import ConfigurationError, nearest
from .run_config import RunConfig, check_control

Settings = TypeVar("Settings")


def resolve(composed: DictConfig) -> RunConfig:
    """The run that a composition describes.

    Raises:
        ConfigurationError: a mandatory setting is missing, or its dataclass refuses a value.
    """
    run = as_settings(composed, RunConfig)
    check_control(run)
    return run


def run_of(config: DictConfig) -> RunConfig:
    """The run that Hydra would hand to the application; `config` still has its `hydra` part."""
    composed = copy.deepcopy(config)
    with open_dict(composed), read_write(composed):
        del composed["hydra"]  # as Hydra itself does before it calls the job
    return resolve(composed)


def as_settings(composed: DictConfig, kind: type[Settings]) -> Settings:
    """The composition as `kind`, the dataclass that its schema was made of, or a subclass.

    Raises:
        ConfigurationError: a mandatory setting is missing, one does not exist (Hydra's "+" adds
            such), or the dataclass refuses a value.
    """
    refuse_unknown(composed, "")
    try:
        for key in sorted(OmegaConf.missing_keys(composed)):
            raise ConfigurationError(f"{key} is not set; give it on the command line as {key}=…")
        settings = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigurationError(str(error).splitlines()[0]) from error
    except (ValueError, TypeError) as error:  # from a __post_init__
        raise ConfigurationError(str(error)) from error
    assert isinstance(settings, kind)
    return settings


def refuse_unknown(node: DictConfig, prefix: str) -> None:
    """Refuse settings that no dataclass has, since nothing would read them.

    Raises:
        ConfigurationError: it names the first one and the nearest known one.
    """
    kind = OmegaConf.get_type(node)
    known = [field.name for field in fields(kind)] if is_dataclass(kind) else None
    for key in node:
        if known is not None and key not in known:
            hint = nearest(str(key), known)
            raise ConfigurationError(
                f"{prefix}{key} is not a setting: {hint}must be one of {', '.join(known)}. Leave "
                "it out, or correct its name."
            )
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            value = node[key]
            if isinstance(value, DictConfig):
                refuse_unknown(value, f"{prefix}{key}.")
