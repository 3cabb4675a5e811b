"""The runs of sweeps: those that a manifest lists, or those in a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .runs import Problem, failure_text, read_json
from .validation import is_text


@dataclass(frozen=True)
class Entry:
    """A run as a sweep lists it. It has no folder if it failed before it made one."""

    folder: Path | None
    status: str
    label: str


@dataclass(frozen=True)
class Listing:
    """The runs that one folder lists, and how many its sweep planned."""

    name: str
    heading: str | None
    entries: list[Entry]
    planned: int | None = None


@dataclass(frozen=True)
class Sweep:
    """Every run that the given folders list.

    Attributes:
        selected: by number of the folder and arm, the setting that its `protocol.json` chose.
        equal_update: likewise, the setting of equal update size.
    """

    name: str
    heading: str | None
    entries: list[Entry]
    problems: list[Problem]
    selected: dict[tuple[int, str], dict[str, Any]]
    equal_update: dict[tuple[int, str], dict[str, Any]]


def load_sweeps(folders: list[Path]) -> Sweep:
    """List the runs of sweep folders (with a `manifest.json`) and of plain folders of runs.

    Raises:
        FileNotFoundError: a folder does not exist, or has neither a manifest nor a run.
        ValueError: a manifest or a protocol cannot be read.
    """
    names, headings, problems, entries = [], [], [], {}
    protocol: dict[str, dict] = {"selected": {}, "equal_update": {}}
    for number, folder in enumerate(map(Path, folders)):
        listed = list_runs(folder)
        names.append(listed.name)
        headings += [listed.heading] if listed.heading else []
        if listed.planned and listed.planned > len(listed.entries):
            missing = listed.planned - len(listed.entries)
            reason = f"{missing} of its {listed.planned} runs never started"
            problems.append(Problem(f"sweep {listed.name}", reason))
        for entry in listed.entries:
            key = os.path.realpath(entry.folder) if entry.folder else entry
            if key not in entries or entry.status == "finished":  # a later job may have done it
                entries[key] = entry
        for part, found in protocol.items():
            found |= {(number, arm): one for arm, one in read_protocol(folder, part).items()}
    heading = headings[0] if len(set(headings)) == 1 else None
    return Sweep(" + ".join(names), heading, list(entries.values()), problems, **protocol)


def read_protocol(folder: Path, part: str) -> dict[str, dict[str, Any]]:
    """One part of a protocol's record by arm; nothing without a protocol."""
    path = folder / "protocol.json"
    if not path.exists():
        return {}
    try:
        return {str(arm): dict(one) for arm, one in read_json(path).get(part, {}).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = f"'{path}' is not a protocol: {error}. Run the sweep's command again."
        raise ValueError(reason) from error


def list_runs(folder: Path) -> Listing:
    """Every run of one folder.

    Raises:
        FileNotFoundError: see `load_sweeps`.
        ValueError: its manifest cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder '{folder}': pass a sweep folder or a folder of runs")
    path = folder / "manifest.json"
    if path.exists():
        try:
            manifest = read_json(path)
            listed = list(manifest["runs"])
            if listed and not any(isinstance(entry, dict) for entry in listed):
                raise TypeError("no entry is an object")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"'{path}' is not a manifest: it needs \"runs\", a list of entries with a "
                f'"folder" each ({error}). Run the sweep again to rewrite it.'
            ) from error
        entries = [listed_run(entry, folder, n) for n, entry in enumerate(listed, start=1)]
        planned, heading = manifest.get("total"), manifest.get("heading")
        return Listing(
            str(manifest.get("sweep", folder.name)),
            heading if is_text(heading) else None,
            entries,
            planned if type(planned) is int else None,
        )
    if (folder / "result.json").exists():
        found = [folder]
    else:
        found = sorted(path.parent for path in folder.glob("*/result.json"))
    if not found:
        raise FileNotFoundError(
            f"'{folder}' has neither a manifest.json nor a subfolder with a result.json: "
            "pass the folder of a sweep, or one whose subfolders are finished runs"
        )
    entries = [Entry(path, "finished", str(path)) for path in found]
    return Listing(folder.resolve().name, None, entries)


def listed_run(entry: Any, sweep_folder: Path, number: int) -> Entry:
    """An entry of a manifest. A damaged one becomes a run without a folder."""
    if not isinstance(entry, dict):
        return Entry(None, "damaged", f"entry {number} of the manifest")
    overrides, given = entry.get("overrides") or [], entry.get("folder")
    overrides = " ".join(map(str, overrides)) if isinstance(overrides, list) else str(overrides)
    if not (given is None or (is_text(given) and "\0" not in given)):
        return Entry(None, "damaged", overrides or f"entry {number} of the manifest")
    label = f"{overrides} ({given})" if overrides and given else overrides or str(given)
    folder = locate(given, sweep_folder) if given else None
    return Entry(folder, str(entry.get("status", "finished")), label)


def locate(path: str, sweep_folder: Path) -> Path:
    """Find a run's folder below the working directory, the sweep's folder or one above that."""
    given = Path(path)
    if given.is_absolute():
        return given
    sweep_folder = sweep_folder.resolve()
    candidates = [root / given for root in (Path.cwd(), sweep_folder, *sweep_folder.parents)]
    finished = (c for c in candidates if (c / "result.json").is_file())
    existing = (c for c in candidates if c.is_dir())
    return next(finished, None) or next(existing, None) or candidates[0]


def finished_folder(entry: Entry) -> Path:
    """The run's folder. Raise with the sweep's reason if it did not finish this run."""
    if entry.status != "finished" or entry.folder is None:
        raise ValueError(f"the sweep marked it '{entry.status}'{failure_text(entry.folder)}")
    return entry.folder
