"""The table of supported combinations of methods, module types and base dtypes.

`python -m lora_init.cli.support` prints it. A cell names the effect on the base weight:

- ``kept``: it does not change.
- ``edited``: s B0 A0 is subtracted from it, and restored within 1e-6 of its largest entry.
- ``in forward``: it does not change, and s B0 A0 is subtracted in the forward pass.
- ``replaced``: a quantized weight replaces it (``*``: computed from `original_weights`).

Every method supports rsLoRA in all its combinations, and DoRA in those whose weight can be read:
not in AQLM, BitNet, EETQ and INC. Experts and routers have no DoRA.
"""

from __future__ import annotations

from lora_init.registry import Initializer, list_initializers
from lora_init.weights.kinds import FORMATS

FLOAT_BASES = ("float32", "16 bits")


def support(
    spec: Initializer, module_type: str, base: str, *, use_dora: bool = False
) -> str | None:
    """A method's effect on a base weight; None if the combination is not supported.

    Args:
        spec: the method.
        module_type: one of `lora_init.weights.kinds.FORMATS`.
        base: "float32", "16 bits" or, for quantized modules, "packed".
    """
    if not spec.supports(FORMATS[module_type]):
        return None
    one = FORMATS[module_type]
    reads = {"weight", "target_weight"} & (spec.reads | spec.options().also_reads())
    if (reads or use_dora) and not one.readable:
        return None
    if use_dora and one.operation in ("routed", "selection"):
        return None
    if spec.base == "keep":
        return "kept"
    if spec.base == "replace" and not one.writable:
        return None
    if spec.base == "replace":
        return "replaced*" if base == "packed" else "replaced"
    editable = base == "float32" and "edit" in one.subtractions
    return "edited" if editable else "in forward"


def bases(module_type: str) -> tuple[str, ...]:
    return ("packed",) if FORMATS[module_type].quantized else FLOAT_BASES


def support_table() -> str:
    """The table as Markdown, with one row per method and one column per module type.

    A cell shows two entries where float32 and 16-bit bases differ, in this order.
    """
    lines = [
        "| method | " + " | ".join(FORMATS) + " |",
        "|---|" + "---|" * len(FORMATS),
    ]
    for spec in list_initializers():
        cells = []
        for kind in FORMATS:
            words = dict.fromkeys(support(spec, kind, base) or "–" for base in bases(kind))
            cells.append(" / ".join(words))
        lines.append(f"| `{spec.name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(support_table())
