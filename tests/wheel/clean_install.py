"""Install a built wheel into a clean environment and check it: `clean_install.py DIST`.

The environment holds the core dependencies only. The package must be imported there in half a
second beyond torch, and must adapt a plain torch model without transformers.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORT_SECONDS = 0.5

IMPORT_TIME = """
import time, torch
start = time.process_time()
import lora_init
print(time.process_time() - start)
"""

PLAIN_MODEL = """
import importlib.util, pathlib, sys
import torch
import lora_init

assert (pathlib.Path(lora_init.__file__).parent / "py.typed").exists()  # for type checkers
assert importlib.util.find_spec("transformers") is None
base = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
x = torch.randn(4, 16)
expected = base(x)
config = lora_init.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="pissa")
model = lora_init.get_peft_model(base, config)
torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
model.save_pretrained("adapter")
print(lora_init.__version__)
"""


WITHOUT_THE_EXTRA = """
from lora_init.cli.parser import main
print(main(["compare", "minilm", "reviews.csv"]))
"""


def check(wheel: Path) -> str:
    """Install the wheel into a new environment, and return the version it reports there."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        install = [python, "-m", "pip", "install", "--quiet", *constraints, str(wheel)]
        subprocess.run(install, check=True)
        version = _run(python, PLAIN_MODEL, folder)
        if _run(python, WITHOUT_THE_EXTRA, folder) != "1":
            raise SystemExit("lora-init compare must name the missing extra")
        # CPU time, and the least of three: other programs on the machine do not count.
        seconds = min(float(_run(python, IMPORT_TIME, folder)) for _ in range(3))
    if seconds > IMPORT_SECONDS:
        raise SystemExit(
            f"import lora_init takes {seconds:.2f} s beyond torch; must be at most {IMPORT_SECONDS}"
        )
    return f"lora_init {version}: imported in {seconds:.2f} s beyond torch"


def _run(python: Path, code: str, folder: str) -> str:
    done = subprocess.run([python, "-c", code], cwd=folder, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode().strip()


def only_wheel(folder: Path) -> Path:
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"{folder} has {len(wheels)} wheels; must be one. Run: make wheel")
    return wheels[0]


if __name__ == "__main__":
    print(check(only_wheel(Path(sys.argv[1]))))
