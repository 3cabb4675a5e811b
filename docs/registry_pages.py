"""Markdown about every registered method: the README's table and one page per method.

`python docs/registry_pages.py` rewrites the table of README.md. The documentation build calls
`write_pages`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path

from lora_init import Initializer, list_initializers
from lora_init.cli.support import support_table

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- methods: begin -->", "<!-- methods: end -->"
BASES = {
    "keep": "stays as it is",
    "subtract": "s B A is subtracted, so that the output stays the same",
    "replace": "is replaced by a quantized weight",
}


def phrase(spec: Initializer) -> str:
    """One line on the method: the first line of its module, without the method's name."""
    line = _docstring(spec).splitlines()[0].rstrip(".")
    name, colon, rest = line.partition(": ")
    if colon and all(word == "or" or word.lower() != word for word in name.split()):
        line = rest
    shown = spec.frozen and not spec.has_core
    return _sentence(line) + (f"; {_frozen(spec)} is frozen" if shown else "")


def trains(spec: Initializer) -> str:
    """What an adapter of the method trains."""
    if spec.has_core:
        return "a matrix R (rank × rank) between A and B"
    return " and ".join(name for name in "AB" if f"lora_{name}" not in spec.frozen)


def reads(spec: Initializer) -> str:
    return ", ".join(sorted(spec.reads)) or "–"


def paper(spec: Initializer) -> str:
    """The method's source, with a link where it is on arXiv."""
    return _linked(spec.paper)


def methods_table(link: str = "") -> str:
    """All methods, one a row.

    Args:
        link: a path with `{name}` in it, to the page of a method.
    """
    lines = ["| name | what it does | reads | base | paper |", "|---|---|---|---|---|"]
    for spec in list_initializers():
        name = f"[`{spec.name}`]({link.format(name=spec.name)})" if link else f"`{spec.name}`"
        lines.append(f"| {name} | {phrase(spec)} | {reads(spec)} | {spec.base} | {paper(spec)} |")
    return "\n".join(lines)


def short_table() -> str:
    """The README's table: the variants of one file share a row, and so do all controls."""
    families: dict[str, list[Initializer]] = {}
    for spec in list_initializers():
        family = "control" if spec.control else spec.function.__module__
        families.setdefault(family, []).append(spec)
    controls = families.pop("control", [])
    lines = ["| name | what it does | reads | base | paper |", "|---|---|---|---|---|"]
    for family in families.values():
        what = phrase(family[0])
        for spec in family[1:]:
            if spec.frozen != family[0].frozen:
                what += f"; `{spec.name}` freezes {_frozen(spec)}"
        papers = dict.fromkeys(paper(spec) for spec in family)
        bases = dict.fromkeys(spec.base for spec in family)
        cells = [
            _names(spec.name for spec in family),
            what,
            reads(family[0]),
            ", ".join(bases),
            "; ".join(papers),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if controls:
        names = _names(spec.name for spec in controls)
        lines.append(f"| {names} | Controls: each isolates one cause of an effect | | | no paper |")
    return "\n".join(lines)


def _frozen(spec: Initializer) -> str:
    return " and ".join(name.removeprefix("lora_") for name in spec.frozen)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def with_table(text: str) -> str:
    """The README with today's table between its two markers."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"README.md must have the lines {START} and {END}")
    return f"{before}{START}\n{short_table()}\n{END}{after}"


def method_page(spec: Initializer) -> str:
    """The page of one method, from what it declares and from its docstring."""
    how, _, deviations = _docstring(spec).partition("\nDeviations:")
    how, _, source = how.partition("\nSource:")
    parts = [
        f"# {spec.name}",
        f"{_markdown(how)}",
        "## At a glance",
        "\n".join(
            [
                "| property | value |",
                "|---|---|",
                f"| reads | {reads(spec)} |",
                f"| base weight | {BASES[spec.base]} |",
                f"| output at step 0 | {'unchanged' if spec.preserves_output else 'changes'} |",
                f"| trains | {trains(spec)} |",
                f"| operations | {', '.join(sorted(spec.operations))} |",
                f"| paper | {paper(spec)} |",
            ]
        ),
        "## Use",
        _use(spec),
    ]
    if fields(spec.options):
        parts += ["## Options", _options_table(spec)]
    if source:
        parts += ["## Source", _linked(_markdown(source))]
    if deviations:
        parts += [
            "## Differences from the paper, its code and PEFT",
            _markdown(_sentence(deviations)),
        ]
    return "\n\n".join(parts) + "\n"


def write_pages(folder: Path) -> None:
    """Write `index.md` and a page per method; a page of a method that is gone is removed."""
    folder.mkdir(exist_ok=True)
    pages = {f"{spec.name}.md": method_page(spec) for spec in list_initializers()}
    names = "\n".join(spec.name for spec in list_initializers())
    head = (ROOT / "docs" / "methods.md.in").read_text()
    pages["index.md"] = head.format(
        methods=methods_table("{name}.md"), support=support_table(), names=names
    )
    for path in folder.glob("*.md"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:  # unchanged pages are not built again
            path.write_text(text)


def _docstring(spec: Initializer) -> str:
    return inspect.cleandoc(sys.modules[spec.function.__module__].__doc__ or spec.name)


def _linked(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:]


def _use(spec: Initializer) -> str:
    request = spec.request(spec.options())
    data = ", calibration=batches" if request is not None else ""
    if request is not None and request.sets:
        sets = ", ".join(f'"{name}": {name}_batches' for name in request.sets)
        data = f", calibration={{{sets}}}"
    data += ", target_weights=second_checkpoint" if "target_weight" in spec.reads else ""
    code = (
        f'config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights="{spec.name}")\n'
        f"model = get_peft_model(model, config{data})"
    )
    note = ""
    if "gradient" in spec.reads:
        note = "\n\nThe batches need labels, or a loss of your own: `WithLoss(batches, loss)`."
    if "target_weight" in spec.reads:
        note = (
            "\n\nThe second checkpoint is a folder, a mapping of tensors, or an adapter's folder."
        )
    if spec.base == "replace":
        note = "\n\nA model that is quantized already also needs `original_weights=`."
    return f"```python\n{code}\n```{note}"


def _options_table(spec: Initializer) -> str:
    meanings: dict[str, str] = {}
    for parent in reversed(spec.options.__mro__[:-1]):
        meanings |= _attributes(inspect.cleandoc(parent.__doc__ or ""))
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for option in fields(spec.options):
        default = option.default
        if default is MISSING and option.default_factory is not MISSING:
            default = option.default_factory()
        meaning = _escaped(meanings.get(option.name, "")).replace("|", "\\|")
        lines.append(f"| `{option.name}` | `{default!r}` | {meaning} |")
    return "\n".join(lines)


def _attributes(docstring: str) -> dict[str, str]:
    """The descriptions in the section "Attributes:" of a docstring."""
    _, _, section = docstring.partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        head = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if head:
            names = head[1].split(", ")
            found.update(dict.fromkeys(names, head[2]))
        else:
            found.update({name: f"{found[name]} {line.strip()}".strip() for name in names})
    return found


def _markdown(text: str) -> str:
    """A docstring's plain text: its indented lines are formulas, and become blocks of code."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.splitlines()
        if all(line.startswith("    ") for line in lines):
            blocks.append("```text\n" + inspect.cleandoc(block) + "\n```")
        else:
            blocks.append(_escaped(block.strip()))
    return "\n\n".join(blocks)


def _escaped(text: str) -> str:
    """Escape symbols outside of backticks that Markdown would read as markup."""
    parts = re.split(r"(`+[^`]*`+)", text)
    return "".join(
        part if index % 2 else re.sub(r"([*_<\[\]])", r"\\\1", part)
        for index, part in enumerate(parts)
    )


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text()))
