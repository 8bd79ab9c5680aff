"""Links between pages, and from pages to files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.pages import PAGES, ROOT, text, without_code

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them in links."""
    headings = _HEADING.findall(without_code(page.relative_to(ROOT).as_posix()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: str) -> list[str]:
    folder = (ROOT / page).parent
    links = [link for link in _LINK.findall(without_code(page)) if "://" not in link]
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    assert not broken_links(page)


def test_every_page_of_the_documentation_is_linked_from_the_readme() -> None:
    linked = set(_LINK.findall(text("README.md")))
    assert {page for page in PAGES if page.startswith("docs/")} <= {link.split("#")[0] for link in linked}


def test_the_readme_is_short() -> None:
    assert len(text("README.md").splitlines()) <= 120
