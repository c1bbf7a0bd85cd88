"""The site that `make docs` builds: its links, its reference, its search, a phone's width."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from browser import visiting

import asgd_fast

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(
        not (ROOT / "docs/conf.py").is_file(), reason="docs/ is in the repository only"
    ),
    pytest.mark.skipif(
        any(find_spec(x) is None for x in ("sphinx", "furo", "myst_parser", "numpydoc")),
        reason="the docs extra is not installed",
    ),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built as by `make docs`: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    options = ("-W", "-q", "-E", "-c", "docs", "-d", folder / "doctrees")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, ".", folder / "html"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(Path(asgd_fast.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "html"


class Page(HTMLParser):
    """What a page links to, and the places that links may name."""

    def __init__(self, path):
        super().__init__()
        self.links, self.places = [], {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.places.add(value)
            elif name in ("href", "src") and value and not urlsplit(value).scheme:
                self.links.append(value)


def test_each_link_leads_to_a_page_and_a_place_in_it(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert site / "index.html" in pages
    assert len(pages) > 15
    broken = []
    n_links = 0
    for path, page in pages.items():
        for link in page.links:
            address, place = urldefrag(link)
            target = path.parent / unquote(urlsplit(address).path) if address else path
            target = Path(os.path.normpath(target))
            known = target not in pages or unquote(place) in pages[target].places
            if not (target.is_file() and known):
                broken.append((path.relative_to(site), link))
            n_links += 1
    assert broken == []
    assert n_links > 500


def test_the_reference_has_every_public_name(site):
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, name: name)
    listed = {name for kind in inventory.values() for name in kind}
    for name in asgd_fast.__all__:
        thing = getattr(asgd_fast, name)
        assert f"asgd_fast.{name}" in listed
        if inspect.isclass(thing):
            ours = [x for x in thing.__mro__ if x.__module__.startswith("asgd_fast.")]
            for member in {y for x in ours for y in vars(x) if not y.startswith("_")}:
                value = inspect.getattr_static(thing, member)
                if inspect.isroutine(value) or isinstance(value, property):
                    assert f"asgd_fast.{name}.{member}" in listed, member


@pytest.fixture(scope="module")
def visit(site, tmp_path_factory):
    with visiting(site, tmp_path_factory.mktemp("profile")) as visit:
        yield visit


def test_a_search_finds_the_page(visit):
    dom = visit("search.html?q=NonMonotonicTrigger")
    _, results = dom.split('<div id="search-results">')
    assert "docs/api/NonMonotonicTrigger.html" in results
    assert "docs/averages.html" in results


# Loads each page into a frame of a phone's width and writes down how far its content reaches to the
# right, but for what scrolls by itself, such as tables. (The theme hides what is too wide.)
PHONE = """<!doctype html><title>phone</title><pre id="widths"></pre><script>
const frame = document.createElement("iframe");
frame.style = "border: 0; width: 360px; height: 800px";
document.body.append(frame);
const pages = %s;
function next() {
  const page = pages.shift();
  if (!page) return;
  frame.onload = () => {
    const scrolls = (x) => x && (/auto|scroll/.test(getComputedStyle(x).overflowX)
      || scrolls(x.parentElement.closest("article *")));
    const width = [...frame.contentDocument.querySelectorAll("article *")]
      .filter((x) => !scrolls(x.parentElement.closest("article *")))
      .reduce((most, x) => Math.max(most, Math.floor(x.getBoundingClientRect().right)), 0);
    document.getElementById("widths").textContent += `${page} ${width}\\n`;
    next();
  };
  frame.src = page;
}
next();
</script>"""


def test_no_page_scrolls_sideways_on_a_phone(site, visit):
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    (site / "phone.html").write_text(PHONE % pages)
    try:
        (text,) = re.findall(r'<pre id="widths">(.*?)</pre>', visit("phone.html"), re.DOTALL)
    finally:
        (site / "phone.html").unlink()
    widths = dict(line.rsplit(" ", 1) for line in text.splitlines())
    assert sorted(widths) == pages
    assert {page for page, width in widths.items() if int(width) > 360} == set()
