"""The site: every page is in its navigation, its links lead somewhere, and it loads nothing from another host.

`make docs` builds it, strictly. What is tested here needs no MkDocs.
"""

import re
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml

import capsnet
from tools.site import DOCS, PAGES, ROOT, local, requested

SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
SOURCES = [*sorted(DOCS.rglob("*.md")), *(ROOT / place for place in PAGES.values())]


def leaves(nav: Any) -> list[str]:
    """The pages that a navigation names, at any depth."""
    if isinstance(nav, str):
        return [nav]
    return [page for one in (nav.values() if isinstance(nav, dict) else nav) for page in leaves(one)]


def test_the_navigation_names_every_page_once() -> None:
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(leaves(SITE["nav"])) == sorted([*pages, *PAGES])


# nothing is loaded from another host


def test_the_settings_that_would_load_from_another_host_are_off() -> None:
    assert SITE["theme"]["font"] is False
    assert SITE["use_directory_urls"] is False
    assert "offline" in SITE["plugins"]
    assert SITE["strict"] is True
    assert not {"extra_javascript", "extra_css", "repo_url"} & SITE.keys()
    (worker,) = SITE["extra"]["polyfills"]
    assert "iframe-worker" in worker  # else the plugin takes its own, from elsewhere
    assert "//" not in worker
    assert (DOCS / worker).is_file()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_page_shows_only_pictures_of_this_repository(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"!\[[^\]]*\]\((?:https?:)?//", text)
    assert requested(text) == []


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://x.org/a.js">',
        '<img src="//x.org/a.png">',
        '<link rel="stylesheet" href="https://x.org/a.css">',
        '<link rel="preconnect" href="https://x.org">',
        '<iframe src="https://x.org">',
        '<video poster="https://x.org/a.png">',
        '<object data="https://x.org/a.svg">',
        '<p style="background: url(https://x.org/a.png)">',
        '@import "https://x.org/a.css";',
    ],
)
def test_what_a_browser_loads_from_elsewhere_is_found(html: str) -> None:
    assert len(requested(html)) == 1


@pytest.mark.parametrize(
    "html",
    [
        '<a href="https://x.org">',
        '<link rel="canonical" href="https://x.org">',
        '<img src="a.png">',
        '<img src="data:image/png;base64,AA//">',
        '<link rel="stylesheet" href="assets/a.css">',
    ],
)
def test_links_and_local_files_are_not(html: str) -> None:
    assert requested(html) == []


# links


def test_links_are_rewritten_for_the_site() -> None:
    page = "[a](experiments.md#cost) ![b](../results/experiments/cost-cpu.png) [c](../CHANGELOG.md) [d](https://x.org)"
    text, needed = local(page, DOCS / "index.md")
    assert text == (
        "[a](experiments.md#cost) ![b](repository/results/experiments/cost-cpu.png) [c](changelog.md) [d](https://x.org)"
    )
    assert needed == {"repository/results/experiments/cost-cpu.png": ROOT / "results/experiments/cost-cpu.png"}
    assert local("[a](docs/index.md)", ROOT / "CHANGELOG.md")[0] == "[a](index.md)"


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "README.md"], ids=lambda path: path.name)
def test_the_links_of_a_page_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (path.parent / target).exists(), target


# the API reference


def test_the_reference_has_every_public_name() -> None:
    entries = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    shown = [each for found in map(resolve_name, entries) for each in (members(found) or {"": found}).values()]
    public = members(capsnet)
    public |= {f"{part}.{name}": each for part, module in public.items() for name, each in members(module).items()}
    missing = [name for name, each in public.items() if not any(each is one for one in shown) and not members(each)]
    assert missing == []
    assert len(public) > 100


def members(module: Any) -> dict[str, Any]:
    """The public names of a module, or nothing."""
    return {name: getattr(module, name) for name in getattr(module, "__all__", ())}
