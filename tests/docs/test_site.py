"""The site builds without a warning, and loads nothing from another host."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("mkdocs", reason="the site is built with fastjepa[docs]")
LOADS = re.compile(
    r"<(?:script|img|iframe|source|video)[^>]*\ssrc=\"?(https?:)?//|<link(?![^>]*canonical)[^>]*href=\"?(https?:)?//"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        found = LOADS.search(page.read_text(encoding="utf-8"))
        assert not found, f"{page.relative_to(site)}: {found and found[0]}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\([\"']?https?:", sheet.read_text(encoding="utf-8")), sheet


def test_mermaid_is_not_used(site: Path) -> None:
    """The theme would fetch it from a host of others as soon as a page has a diagram of it."""
    for page in site.rglob("*.html"):
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8"), page


def test_the_reference_is_there(site: Path) -> None:
    assert 'id="optim.lr"' in (site / "reference/configuration/index.html").read_text(encoding="utf-8")
    assert "--print-config" in (site / "reference/commands/index.html").read_text(encoding="utf-8")
    for module, name in (
        ("interop", "load_official"),
        ("masks", "MultiBlockMasks"),
        ("kernels", "gather_tokens"),
    ):
        assert f'.{name}"' in (site / "api" / module / "index.html").read_text(encoding="utf-8")
