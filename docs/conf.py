"""Sphinx builds the documentation with this: `make docs`.

Nothing is fetched while it builds, and nothing from another host is in what it writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from deferlib import __version__  # noqa: E402  # the path comes first

project = "deferlib"
copyright = "the deferlib authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "deferlib_reference"]
exclude_patterns = ["_build", "_ext"]
source_suffix = {".md": "markdown"}

myst_heading_anchors = 3  # links to `page.md#a-heading` are checked
myst_enable_extensions = ["deflist"]
smartquotes = False  # '' is an empty string, not two apostrophes

# Docstrings are the source of the API reference. A word in `backticks` is a link if it is a name of ours.
default_role = "py:obj"
autodoc_typehints = "signature"
autodoc_type_aliases = {"AsgiApp": "AsgiApp", "WsgiApp": "WsgiApp", "Micros": "Micros"}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"deferlib {release}"
html_copy_source = False
html_show_sphinx = False
html_theme_options: dict[str, object] = {"footer_icons": []}
