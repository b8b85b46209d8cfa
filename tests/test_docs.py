"""The documentation builds as a site without a warning, and every page of the repository is in it."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    return folder


def test_every_page_is_in_the_site_and_reachable(site):
    index = (site / "index.html").read_text()
    for page in [*(path.stem for path in (ROOT / "docs").glob("*.md")), "data"]:
        assert (site / page / "index.html").is_file(), page
        assert f'href="{page}/"' in index, f"{page} is not in the navigation"


def test_the_site_has_the_readme_the_data_page_and_docstrings(site):
    assert "Where an image goes in and a loss comes out" in (site / "index.html").read_text()
    assert "img2dataset" in (site / "data" / "index.html").read_text()
    api = (site / "api" / "index.html").read_text()
    for name in ("pretrained.load", "train.train", "early_stopping.EarlyStoppingOptions", "report.base.Result"):
        assert f'id="flair_jax.{name}"' in api, name


def test_the_site_asks_nobody_else(site):
    """No script, font or style of another server."""
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img)\b[^>]*>", page.read_text()):
            if 'rel="canonical"' not in tag:
                assert not re.search(r'(?:src|href)="?(?:https?:)?//', tag), (page, tag)
