"""Configuration of the documentation: `make docs` builds it into docs/_build."""

import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

import registry_pages  # noqa: E402
from sphinx.pycode import ModuleAnalyzer  # noqa: E402

import lora_init  # noqa: E402

project = "lora_init"
author = "The lora_init authors"
copyright = author
release = lora_init.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = False

# Notebooks are executed by the tests, and stored with their outputs.
nb_execution_mode = "off"
nb_output_stderr = "remove"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

default_role = "code"  # the docstrings write `name`, as Markdown does
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # they would repeat shapes that the signature has

html_theme = "furo"
html_title = "lora_init"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["protocol.html"]  # a page that the report has written
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def write_generated_pages(app, config) -> None:
    """Pages that follow from the registry, and the notebooks of examples/."""
    registry_pages.write_pages(DOCS / "methods")
    notebooks = DOCS / "notebooks"
    notebooks.mkdir(exist_ok=True)
    for path in (ROOT / "examples").glob("*.ipynb"):
        shutil.copy2(path, notebooks)


def hide_overloads(app, config) -> None:
    """Show the arguments of `get_peft_model` and their defaults, not its overloads."""
    api = ModuleAnalyzer.for_module("lora_init.api")
    api.analyze()
    api.overloads.clear()


def setup(app) -> None:
    app.connect("config-inited", write_generated_pages)
    app.connect("config-inited", hide_overloads)
