"""Controls: what a run isolates, by name (`control=rslora`), and whether its settings say the same.

Each is a file in `conf/control/` that sets what makes it one. A name in a result must be true, and
the command line overrides those files, so that the settings are looked at again here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments.errors import ConfigurationError, nearest
from lora_init import list_initializers

if TYPE_CHECKING:
    from experiments.config.schema import RunConfig

NONE = "none"
BY_SETTING: dict[str, tuple[str, Callable[[RunConfig], bool]]] = {
    "rslora": ("lora.use_rslora=true", lambda run: run.lora.use_rslora),
    "lora_plus": ("training.lora_plus_ratio=16", lambda run: run.training.lora_plus_ratio != 1),
}
"""Controls that are a setting: what `conf/control/` sets, and whether a run has such a setting."""


def check_control(run: RunConfig) -> None:
    """Refuse a control that the run's settings are not.

    Raises:
        ConfigurationError: an unknown name, or other settings than the control's.
    """
    methods = [spec.name for spec in list_initializers() if spec.control]
    known = [NONE, *BY_SETTING, *methods]
    if run.control not in known:
        raise ConfigurationError(
            f"control={run.control!r}; {nearest(run.control, known)}allowed are {', '.join(known)}"
        )
    if run.control in BY_SETTING:
        setting, holds = BY_SETTING[run.control]
        if not holds(run):
            raise ConfigurationError(
                f"control={run.control} means {setting} or the like, which another override took "
                "back; leave that override out, or set control=none"
            )
    elif run.control in methods and run.init.name != run.control:
        raise ConfigurationError(
            f"control={run.control} means init={run.control}, and init={run.init.name} is given; "
            "leave init out, or set control=none"
        )


def control_of(run: RunConfig) -> str:
    """The name for the result: also of a control method that was asked for as init=… alone."""
    methods = [spec.name for spec in list_initializers() if spec.control]
    return run.init.name if run.control == NONE and run.init.name in methods else run.control
