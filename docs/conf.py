"""Sphinx: the pages of this folder, the tutorials executed, and the API reference. `make docs` runs it.

Tutorials run on the CPU with the interpreter that builds the pages. A cell that raises, or a command in a cell that
fails, ends the build.
"""

import functools
import os
import re
import sys
from pathlib import Path

from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import toruslab  # noqa: E402

project = "toruslab"
author = "toruslab developers"
project_copyright = author
version = release = toruslab.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["data", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"toruslab {version}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
pygments_style, pygments_dark_style = "friendly", "monokai"
nitpicky = False

# Tutorials. The kernel inherits this environment: commands of this installation first, no accelerator, wide tables.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
os.environ |= {"JAX_PLATFORMS": "cpu", "COLUMNS": "118", "BASH_ENV": str(ROOT / "docs" / "plain_terminal.sh")}
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
# A command writes its output in pieces that end anywhere. nbclient joins them as they are; myst-nb breaks lines there.
NotebookClient.__init__ = functools.partialmethod(NotebookClient.__init__, coalesce_streams=True)
nb_output_stderr = "remove"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

# API reference. Docstrings are plain text in Google style; see `_literal`.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


def _literal(app, what, name, obj, options, lines: list[str]) -> None:
    """Backticks of docstrings as literals, also where a plural s follows, which reStructuredText refuses."""
    text = re.sub(r"(?<!`)`([^`]+?)\s*`(?!`)(?=(\w?))", lambda m: f"``{m[1]}``" + "\\ " * bool(m[2]), "\n".join(lines))
    lines[:] = text.split("\n")


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _literal, priority=400)  # before napoleon
