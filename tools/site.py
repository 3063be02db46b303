"""Hooks of MkDocs, see `mkdocs.yml`: pages and files from outside docs/, and no request to another host.

Pages link to records, source and pictures where these lie in the repository, so that the links work on GitHub too.
Each file that is linked to is copied into the site, under `repository/`.
"""

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

__all__ = ["PAGES", "local", "requested"]

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "records.md": "results/README.md"}
"""Pages of the site that lie elsewhere, by their name in the site."""
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
"""The target of a link or picture in Markdown, and its anchor."""


def local(markdown: str, source: Path) -> tuple[str, dict[str, Path]]:
    """The text of the page `source` with links for the site, and by address the files outside docs/ that these need."""
    needed = dict[str, Path]()

    def target(match: re.Match[str]) -> str:
        path = (source.parent / match[1]).resolve()
        anchor = match[2] or ""
        if path.is_relative_to(DOCS):
            return path.relative_to(DOCS).as_posix() + anchor
        inside = path.relative_to(ROOT).as_posix()
        for page, place in PAGES.items():
            if place == inside:
                return page + anchor
        if path.is_file():
            needed[f"repository/{inside}"] = path
            return f"repository/{inside}"
        return match[1] + anchor  # of which MkDocs warns

    return LINK.sub(target, markdown), needed


class _Addresses(HTMLParser):
    """Collects the addresses that a browser loads by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found = list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        names = ["src", "srcset", "poster"]
        names += ["href"] * (tag == "link" and given.get("rel") not in ("canonical", "next", "prev"))
        names += ["data"] * (tag == "object")
        self.found += [given[name] for name in names if name in given]


def requested(html: str) -> list[str]:
    """Addresses on other hosts that a browser loads to show this page: scripts, styles, fonts, pictures, frames."""
    parser = _Addresses()
    parser.feed(html)
    styles = re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)", html)
    return [address for address in (*parser.found, *styles) if re.match(r"\s*(?:https?:)?//", address)]


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from elsewhere, and each file that a page links to."""
    from mkdocs.structure.files import File

    for name, place in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / place)))
    needed = dict[str, Path]()
    for path in (*DOCS.rglob("*.md"), *(ROOT / place for place in PAGES.values())):
        needed |= local(path.read_text(encoding="utf-8"), path)[1]
    for name, path in needed.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Links as they are in the site."""
    return local(markdown, Path(page.file.abs_src_path))[0]


def on_post_build(config: Any) -> None:
    """Raise unless every page shows without a request to another host."""
    from mkdocs.exceptions import PluginError

    for folder, _, names in os.walk(config.site_dir):
        for name in names:
            path = Path(folder) / name
            if path.suffix in (".html", ".css") and (addresses := requested(path.read_text(encoding="utf-8"))):
                raise PluginError(f"{path} must load nothing from another host; got {addresses[0]}")
