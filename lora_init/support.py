"""What works with what, read from the registry: `python -m lora_init.support` prints the table.

A cell says what becomes of the base weight:

- ``kept``: it stays as it is;
- ``edited``: s B0 A0 is subtracted from it, and comes back within 1e-6 of its largest entry;
- ``in forward``: it stays, and s B0 A0 is subtracted in the forward pass: to the last bit;
- ``replaced``: a quantised weight takes its place (``*``: computed from `original_weights`).

Every method runs with rsLoRA and DoRA wherever it runs at all.
"""

from __future__ import annotations

from lora_init.registry import Initializer, list_initializers
from lora_init.weights.module_types import MODULE_TYPES

FLOAT_BASES = ("float32", "16 bits")
PACKED_TYPES = ("Linear4bit", "Linear8bitLt")


def support(spec: Initializer, module_type: str, base: str) -> str | None:
    """What becomes of a base under a method; None where it is refused by name.

    Args:
        module_type: one of `lora_init.weights.kinds.MODULE_TYPES`.
        base: "float32", "16 bits" or, for bitsandbytes' modules, "packed".
    """
    if module_type not in spec.modules:
        return None
    if spec.base == "keep":
        return "kept"
    if spec.base == "replace":
        return "replaced*" if base == "packed" else "replaced"
    return "edited" if base == "float32" else "in forward"


def bases(module_type: str) -> tuple[str, ...]:
    return ("packed",) if module_type in PACKED_TYPES else FLOAT_BASES


def support_table() -> str:
    """The table as Markdown: a method a row, a module type a column.

    Where float32 and 16-bit bases differ, a cell has both, in this order.
    """
    lines = [
        "| method | " + " | ".join(MODULE_TYPES) + " |",
        "|---|" + "---|" * len(MODULE_TYPES),
    ]
    for spec in list_initializers():
        cells = []
        for kind in MODULE_TYPES:
            words = dict.fromkeys(support(spec, kind, base) or "–" for base in bases(kind))
            cells.append(" / ".join(words))
        lines.append(f"| `{spec.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(support_table())
