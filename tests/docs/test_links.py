"""Every relative link of the documentation leads to a file that is there, and to a heading in it."""

import re
from pathlib import Path

import pytest

from scripts.docs import settings
from scripts.docs.hooks import MADE, on_page_markdown
from tests.conftest import ROOT
from tests.docs.blocks import PAGES, prose

LINK = re.compile(r"\]\(([^)\s]+)\)|<(?:img|a)[^>]*(?:src|href)=\"([^\"]+)\"")


def links(page: Path) -> list[str]:
    found = [inside or tag for inside, tag in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page)))]
    return [link for link in found if not re.match(r"https?://|mailto:", link)]


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as mkdocs and GitHub name them, and those given by hand."""
    text = on_page_markdown(path.read_text(encoding="utf-8"))
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}
    return slugs | set(re.findall(r'id="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken, f"{page} links to what is not there: {broken}"


def test_the_site_links_to_nothing_outside_docs() -> None:
    """GitHub would follow it and the site could not."""
    inside = (ROOT / "docs").resolve()
    for page in PAGES:
        if page.parts[0] == "docs":
            for link in links(page):
                target = ((ROOT / page).parent / link.partition("#")[0]).resolve()
                assert target.is_relative_to(inside), f"{page}: {link}"


def test_every_marker_is_of_a_page() -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert all(marker in text for marker in MADE)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    for page in PAGES:
        if page.parts[0] == "docs":
            assert f": {page.relative_to('docs')}\n" in navigation, f"{page} is not in nav of mkdocs.yml"


def test_settings_named_in_the_text_exist() -> None:
    known = {
        f"{name}.{s.name}" for name, section in settings.sections() for s in settings.settings_of(section)
    }
    names = "|".join(name for name, _ in settings.sections())
    for page in PAGES:
        for name in re.findall(rf"`((?:{names})\.[a-z_]+)(?:=[^`]*)?`", prose(page)):
            assert name in known, f"{page} names the setting {name}, which is not there"
