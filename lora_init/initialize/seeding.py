"""Random streams: one per (seed, module name), so that no layer's draw depends on another's."""

from __future__ import annotations

import hashlib

import torch


def layer_generator(seed: int, name: str) -> torch.Generator:
    """Return the CPU generator that belongs to the layer `name` under `seed`.

    The stream is keyed by the first 63 bits of SHA-256 of ``"{seed}:{name}"``. It does not depend
    on which other layers are targeted, on their order, on the device or on the process rank; draws
    are made on the CPU and moved afterwards, because CUDA's generator gives other numbers.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return generator
