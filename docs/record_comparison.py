"""Record `lora-init compare` from an empty folder, after `pip install` of the built wheel.

`python docs/record_comparison.py` writes the recording into `docs/guides/command.md`. The wheel
goes into a new environment, which finds the dependencies of this one. Nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "guides" / "command.md"
MARKS = ("<!-- recording: begin -->\n", "<!-- recording: end -->\n")
COMMAND = (
    *("lora-init", "compare", "minilm", "reviews.csv", "--text", "review", "--label", "verdict"),
    *("--methods", "kaiming,pissa,eva", "--seeds", "0", "--rates", "1", "--steps", "30"),
    *("--jobs", "1", "--set", "hydra.sweeper.max_extensions=0"),
)


def record(command: Sequence[str], wheel: Path, folder: Path) -> str:
    """Install the wheel, run the command in an empty folder, and return what it prints."""
    environment, empty = folder / "environment", folder / "empty"
    venv.create(environment, with_pip=True)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    python = environment / "bin" / "python"
    site = subprocess.run([python, "-c", purelib], check=True, capture_output=True, text=True)
    (Path(site.stdout.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    empty.mkdir()
    shutil.copy(ROOT / "examples" / "reviews.csv", empty)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [environment / "bin" / command[0], *command[1:]],
        cwd=empty,
        env=variables | {"COLUMNS": "100", "LORA_INIT_CACHE": "off"},
        stdout=subprocess.PIPE,
        text=True,
    )
    text = done.stdout.replace(f"{empty.resolve()}/", "")
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{text}")
    return re.sub(r" +$", "", text, flags=re.MULTILINE)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", temporary, str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = folder.glob("*.whl")
        text = record(COMMAND, wheel, folder)
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    block = f"```text\n$ {' '.join(COMMAND)}\n{text.rstrip()}\n```\n"
    PAGE.write_text(f"{before}{MARKS[0]}{block}{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
