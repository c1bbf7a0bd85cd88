"""The configuration of Sphinx, by which `make docs` builds the site.

Its source is the root of the repository, and README.md the start page: so a link from one page to
another is the same on a code host and on the site.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "asgd_fast"
author = "The asgd_fast developers"
project_copyright = author
version = release = importlib.metadata.version("asgd_fast")

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx_copybutton"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/api/*.rst"]
exclude_patterns = [".*", "asgd_fast", "asv_benchmarks", "build", "dist", "examples", "tests"]

myst_heading_anchors = 4
numpydoc_show_class_members = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_mock_imports = ["lightning"]  # only the callback's base class comes from it
autodoc_typehints = "none"  # numpydoc's sections have them
copybutton_prompt_text = ">>> |\\.\\.\\. |\\$ "
copybutton_prompt_is_regexp = True

highlight_language = "none"  # formulas are no Python

html_theme = "furo"
html_title = f"asgd_fast {release}"
html_copy_source = False
html_show_sphinx = False
html_use_index = False  # the reference and the search have every name

CONTENTS = {
    "Use": ["guide", "averages", "frameworks", "numpy", "distributed", "gpu", "faq"],
    "Reference": [
        "api/ASGD",
        "api/ArrayASGD",
        "api/asgd_",
        "api/Schedule",
        "api/NonMonotonicTrigger",
        "api/frameworks",
        "api/settings",
    ],
    "Trust": ["numerics", "performance", "benchmarks", "reliability"],
    "Project": ["/CHANGELOG", "/CONTRIBUTING", "/SECURITY"],
}


# Where `make docs` puts the page of asv.
SPEED = """
## The page

<a href="../speed/index.html#torch_optimizer.Sizes.time_step?y-axis-scale=log">The benchmarks of
notable commits</a>, as asv draws them.
"""


def add_to_pages(app: Sphinx, page: str, source: list[str]) -> None:
    """Append what a code host does not have or would show as code: contents, and asv's page."""
    if page == root_doc:
        for caption, names in CONTENTS.items():
            pages = "\n".join(name if name[0] == "/" else f"/docs/{name}" for name in names)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"
    if page == "docs/benchmarks" and app.tags.has("speed"):
        source[0] += SPEED


def copy_start_page(app: Sphinx, error: Exception | None) -> None:
    """Let a server find the start page, which lies in the same folder under another name."""
    page = Path(app.outdir, f"{root_doc}.html")
    if error is None and page.exists():
        shutil.copy(page, page.with_name("index.html"))


def setup(app: Sphinx) -> None:
    """Do what no setting does."""
    app.connect("source-read", add_to_pages)
    app.connect("build-finished", copy_start_page)
