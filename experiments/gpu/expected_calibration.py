"""What calibration passes should take on an H200, from counts and unit costs.

    python -m experiments.gpu.expected_calibration

Device work and host work overlap: the longer of the two counts.
"""

from __future__ import annotations

from experiments.gpu.blocks import LINEAR, LLAMA_1B, LLAMA_2_7B, Shape
from experiments.gpu.expected import BANDWIDTH, FLOAT64, LAUNCH
from lora_init.linalg.gram import SMALLEST_BLOCK

TOKENS, BATCH = 16384, 2048
BFLOAT16 = 600e12  # operations a second of products
HOOK = 45e-6  # the host's time for a layer's hook
INPUTS_PER_BLOCK = 4  # of q, k and v; of o; of gate and up; of down

FORWARD_KERNELS = 49  # a block, counted
HIDDEN_BYTES, INTERMEDIATE_BYTES = 168, 10  # a token, block and column, besides products; counted

ROW_KERNELS = 8  # an input and batch, besides products
ROW_BYTES = 26  # a number of a 16-bit row: shift, sum, two parts, squares of the low one
ROW_BYTES_FLOAT64 = 18  # shift to float64, sum
TAP_BYTES = 4  # an output, cloned
FINAL_READS = 8  # of each sum, once: mirrored, divided, centered


def triangle(columns: int, diagonal: int, corner: int) -> tuple[int, int]:
    """Entries of XᵀX that are computed, with repetitions, and the products that it takes.

    Args:
        diagonal, corner: products for a block on the diagonal, and for one off it.
    """
    if columns <= SMALLEST_BLOCK["cuda"]:
        return diagonal * columns**2, diagonal
    half = columns // 2
    entries, products = triangle(half, diagonal, corner)
    return 2 * entries + corner * half**2, 2 * products + corner


def weights(shape: Shape) -> int:
    """Of the linear layers of a block."""
    keys = shape.hidden * shape.key_value_heads // shape.heads
    return 2 * shape.hidden * (shape.hidden + keys) + 3 * shape.hidden * shape.intermediate


def outputs(shape: Shape) -> int:
    """Numbers that the linear layers of a block compute for a token."""
    keys = shape.hidden * shape.key_value_heads // shape.heads
    return 3 * shape.hidden + 2 * keys + 2 * shape.intermediate


def plain(shape: Shape) -> tuple[float, float]:
    """Seconds of a forward pass: the device's and the host's."""
    products = shape.blocks * weights(shape) + shape.hidden * shape.vocabulary
    moved = HIDDEN_BYTES * shape.hidden + INTERMEDIATE_BYTES * shape.intermediate
    device = TOKENS * (2 * products / BFLOAT16 + shape.blocks * moved / BANDWIDTH)
    return device, TOKENS / BATCH * shape.blocks * FORWARD_KERNELS * LAUNCH


def sums(shape: Shape, in_float64: bool) -> tuple[float, float]:
    """The same for the sums of all inputs, without the forward pass."""
    widths = [shape.hidden] * (INPUTS_PER_BLOCK - 1) + [shape.intermediate]
    counts = [triangle(width, 1, 1) if in_float64 else triangle(width, 2, 3) for width in widths]
    entries = shape.blocks * sum(found for found, _ in counts)
    size = 8 if in_float64 else 4
    batches = TOKENS / BATCH
    rows = shape.blocks * sum(widths) * (ROW_BYTES_FLOAT64 if in_float64 else ROW_BYTES)
    stored = shape.blocks * sum(width**2 for width in widths)
    moved = TOKENS * rows + 2 * size * entries * batches + FINAL_READS * size * stored
    device = 2 * TOKENS * entries / (FLOAT64 if in_float64 else BFLOAT16) + moved / BANDWIDTH
    kernels = shape.blocks * sum(ROW_KERNELS + products for _, products in counts)
    return device, batches * (kernels * LAUNCH + shape.blocks * len(LINEAR) * HOOK)


def gradients(shape: Shape) -> tuple[float, float]:
    """The same for forward, backward and the sums of all gradients."""
    device, host = plain(shape)
    entries, batches = shape.blocks * weights(shape), TOKENS / BATCH
    moved = 8 * entries * batches + TAP_BYTES * TOKENS * shape.blocks * outputs(shape)
    added = 2 * TOKENS * entries / BFLOAT16 + moved / BANDWIDTH
    hooks = 2 * batches * shape.blocks * len(LINEAR) * HOOK
    return 2 * device + added, 3 * host + hooks


def passes(shape: Shape) -> dict[str, tuple[float, float]]:
    """Seconds of each kind of pass, and how many plain passes these are."""
    forward = plain(shape)
    whole = {"plain forward": forward}
    for name, in_float64 in (("second moments", False), ("second moments in float64", True)):
        added = sums(shape, in_float64)
        whole[name] = forward[0] + added[0], forward[1] + added[1]
    found = {name: (max(parts), max(parts) / max(forward)) for name, parts in whole.items()}
    # With gradients of all parameters, as training without an adapter computes them.
    reference = 3 * max(forward)
    taken = max(gradients(shape))
    return found | {
        "plain forward and backward": (reference, 1.0),
        "gradients": (taken, taken / reference),
    }


def table() -> str:
    """The estimates as a Markdown table, as docs/gpu.md has them."""
    lines = ["| pass over 16k tokens | model | seconds | plain passes |", "|---|---|---|---|"]
    for shape in (LLAMA_2_7B, LLAMA_1B):
        for name, (taken, ratio) in passes(shape).items():
            lines.append(f"| {name} | {shape.name} | {taken:.2f} | {ratio:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
