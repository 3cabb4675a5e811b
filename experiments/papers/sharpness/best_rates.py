"""The learning rates that sweeps found best: from the settings, or from a protocol's record."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.errors import ConfigurationError


def protocol_rates(folder: str, rank: int) -> dict[str, float]:
    """By initializer, the rate that a sweep of the fair protocol chose at `rank`.

    Controls are left out: they are no starts of their own.

    Raises:
        ConfigurationError: no record there, an unreadable one, or none of this rank.
    """
    path = Path(folder).expanduser() / "protocol.json"
    try:
        selected = json.loads(path.read_text())["selected"].values()
        found = {
            entry["method"]: float(entry["learning_rate"])
            for entry in selected
            if entry["rank"] == rank and entry["arm"] == entry["method"]
        }
        ranks = sorted({entry["rank"] for entry in selected})
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"protocol={folder!r}: no protocol.json there; give the folder of a sweep that "
            "`--config-name sweep_protocol` has written"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"protocol={folder!r}: {path} cannot be read: {error}") from error
    if not found:
        raise ConfigurationError(
            f"protocol={folder!r}: nothing chosen at rank {rank}; its ranks are "
            f"{', '.join(map(str, ranks)) or 'none'}"
        )
    return found
