"""Training steps, injection and memory beside PEFT, on tiny models."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.benchmark import contenders, injection, memory, peaks, steps
from experiments.benchmark.subjects import load_subject
from experiments.errors import RunFailed

ROOT = Path(__file__).resolve().parents[3]


def test_steps(settings):
    rows = steps.run(settings)
    for model in ("encoder", "decoder"):
        lora, dora, *more = (row for row in rows if row.model == model)
        assert lora.case == "LoRA"
        assert min(lora.ours, lora.peft) > 0
        assert lora.ratio.low <= lora.ratio.estimate <= lora.ratio.high
        assert lora.target == settings.models[model].targets.get("lora")
        assert dora.case == "DoRA"
        if dora.note:
            assert "use_dora" in dora.note
            assert dora.ratio is None
            assert not more
        else:
            assert [row.case for row in more] == ["DoRA's step over LoRA's"]
        for row in (lora, dora):
            assert row.figures.get("loss difference", 0.0) <= 1e-5, "ours and PEFT compute the same"


def test_a_differing_adapter_is_refused(settings):
    subject = load_subject("encoder", settings)
    request = contenders.Request("SEQ_CLS", 2, 4, 0)
    ours = contenders.adapt_ours(subject.model, request)
    other = load_subject("encoder", settings).model
    theirs = contenders.adapt_peft(
        other, contenders.Request("SEQ_CLS", 2, 4, 0, exclude=".*pooler.*")
    )
    with pytest.raises(RunFailed, match=r"different layers, e\.g\. .*pooler"):
        contenders.copy_factors(ours, theirs)


def test_injection(settings):
    for row in injection.run(settings):
        stages = [row.figures[f"our {stage}, s"] for stage in ("plan", "initialize", "inject")]
        assert all(spent > 0 for spent in stages)
        assert max(stages) <= 1.5 * row.ours
        assert row.target == 1.0
    assert injection.split(5.0, {"initialize": 1.0, "inject": 2.0, "total": 3.0}) == {
        "plan": 2.0, "initialize": 1.0, "inject": 2.0,
    }  # fmt: skip


def test_memory(settings, in_process):
    (row,) = memory.run(settings)
    assert row.unit == "MiB"
    assert row.note == ""
    assert None not in (row.ours, row.peft, row.figures["promised, MiB"])
    parts = row.figures["factors, MiB"] + row.figures["workspace, MiB"]
    assert row.figures["promised, MiB"] == pytest.approx(parts)


def test_the_peak_is_seen_after_it_is_gone():
    watch = peaks.HostPeak()
    block = torch.ones(30 * peaks.MIB // 4)
    del block
    if not watch.note:
        assert 28 <= watch.rise() / peaks.MIB <= 60


HANDED_BACK = """
import torch
from experiments.benchmark import peaks

with peaks.handing_back():
    blocks = [torch.ones(peaks.MIB // 4) for _ in range(30)]
    watch = peaks.HostPeak()
    del blocks
    print("unknown" if watch.note else (watch.start - peaks.status("VmRSS")) // peaks.MIB)
"""


def test_small_blocks_are_handed_back_at_once():
    """In a process of its own, as the benchmark does: this one's heap has a history."""
    told = subprocess.run(
        [sys.executable, "-c", HANDED_BACK], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert told.stdout.strip() == "unknown" or int(told.stdout) >= 25
