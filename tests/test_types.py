"""Type checkers understand the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn, ones

import lora_init
from lora_init import get_peft_model, init_factors

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "support" / "typed_script.py"


@pytest.mark.exhaustive  # ten seconds; `make lint` does the same
def test_a_typed_script_has_no_errors():
    command = [sys.executable, "-m", "basedpyright", "--outputjson", str(SCRIPT)]
    done = subprocess.run(
        [*command, "--pythonpath", sys.executable], cwd=ROOT, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    assert found["generalDiagnostics"] == []


def test_the_package_says_that_it_is_typed():
    assert (Path(lora_init.__file__).parent / "py.typed").exists()


def test_annotated_types_and_shapes_are_checked(pytestconfig):
    """Else the annotations of all methods would go unchecked in silence."""
    if pytestconfig.getoption("--no-check-shapes"):
        pytest.skip("the checks are off")
    with pytest.raises(TypeError, match=r"violates type hint .*Float\[Tensor, .*stack out in"):
        init_factors(ones(3), "pissa", r=1)
    with pytest.raises(TypeError, match="peft_config=.*violates type hint .*LoraConfig"):
        get_peft_model(nn.Linear(2, 2), "pissa")
