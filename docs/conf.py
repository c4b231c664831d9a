"""How Sphinx builds the site.  ``make docs`` treats every warning as an error."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

sys.path.insert(0, str(Path(__file__).parent.parent))

import compressm
from compressm._version import __version__
from compressm.errors import CompressmError

project = "compressm"
author = "The compressm contributors"
copyright = "The compressm contributors, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_heading_anchors = 4
nitpicky = False  # docstrings name types in prose

html_theme = "furo"
html_title = f"compressm {__version__}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = True

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True, "undoc-members": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

LLMS_HEAD = f"""# compressm {__version__}

> State-space models that grow smaller and faster while they train: a PyTorch library with its own C++ and Triton kernels.

Every page is also there as the text it is made of, under the address given.
"""


def llms_text(app: Sphinx, error: Exception | None) -> None:
    """Write ``llms.txt``: every page with its address as text and its first paragraph."""
    if error is not None or app.builder.format != "html":
        return
    lines = [LLMS_HEAD]
    for name in sorted(app.env.found_docs, key=lambda name: (name != "index", "/" in name, name)):
        tree = app.env.get_doctree(name)
        first = next((node.astext() for node in tree.findall(nodes.paragraph)), "")
        summary = " ".join(first.split()).partition(". ")[0].rstrip(".:")
        lines.append(f"- [{app.env.titles[name].astext()}](_sources/{name}.md.txt): {summary}")
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# What the theme leaves out for people who use a keyboard or a screen reader.
FOR_ALL = {
    "<pre>": '<pre tabindex="0">',  # what scrolls sideways takes the focus
    '<div class="table-wrapper colwidths-auto docutils container">': (
        '<div class="table-wrapper colwidths-auto docutils container" tabindex="0">'
    ),
    'role="heading">': 'role="heading" aria-level="2">',
    '<aside class="sidebar-drawer">': '<aside class="sidebar-drawer" aria-label="all pages">',
    '<div class="view-this-page">': '<div class="view-this-page" role="navigation" aria-label="source of this page">',
}
SIGNATURE = re.compile("<dl>\n((?:<dd>.*</dd>\n)+)</dl>")  # over several lines: a list of definitions, which it is not


def for_all(app: Sphinx, error: Exception | None) -> None:
    """Put ``FOR_ALL`` into every page, and make lines of what are the lines of a signature."""
    if error is not None or app.builder.format != "html":
        return
    absent = set(FOR_ALL)
    for path in Path(app.outdir).rglob("*.html"):
        page = path.read_text(encoding="utf-8")
        for plain, better in FOR_ALL.items():
            page = page.replace(plain, better)
            absent -= {plain} if better in page else set()
        page = SIGNATURE.sub(lambda lines: f'<div class="sig-lines">\n{lines[1].replace("dd>", "div>")}</div>', page)
        path.write_text(page, encoding="utf-8")
    if absent:
        raise ExtensionError(f"no page has {sorted(absent)}: see what the theme writes now, and FOR_ALL in docs/conf.py")


def plain_text(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with literals: bars are moduli, and a literal may have an ending."""
    for number, line in enumerate(lines):
        parts = re.split(r"(``.+?``)", line)
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        parts[2::2] = [re.sub(r"^(?=\w)", r"\\ ", part) for part in parts[2::2]]
        lines[number] = "".join(parts)


def once(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """What several packages export is described once: errors on their page, all else that the top exports on its page."""
    page = app.env.docname
    name = name.rpartition(".")[2]
    if what != "module" or name not in compressm.__all__:
        return None
    error = isinstance(thing, type) and issubclass(thing, CompressmError)
    return True if page != f"reference/{'errors' if error else 'compressm'}" else None


def every_name(app: Sphinx, error: Exception | None) -> None:
    """Refuse a site without one of the names that its packages list; what several export is on the page of one."""
    if error is not None or app.builder.format != "html":
        return
    domain = app.env.get_domain("py")
    described = {name for name, _, _, _, _, _ in domain.get_objects()}
    for package in sorted(name for name, _, kind, _, _, _ in domain.get_objects() if kind == "module"):
        for name in getattr(importlib.import_module(package), "__all__", ()):
            if not {f"{home}.{name}" for home in (package, "compressm", "compressm.errors")} & described:
                way = "Give it a docstring, or a py:data directive where it is no class or function"
                raise ExtensionError(f"{package}.{name} is on no page of the reference. {way}")


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", plain_text)
    app.connect("autodoc-skip-member", once)
    app.connect("build-finished", llms_text)
    app.connect("build-finished", for_all)
    app.connect("build-finished", every_name)
