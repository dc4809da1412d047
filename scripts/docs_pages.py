"""A hook of mkdocs: pages that lie outside docs/ join the site, and links follow them.

The README is the site's first page. A link to a file of the repository that is no page (a notebook, a source) becomes
plain text on the site; it has to exist all the same.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
IMAGES = ("benchmarks/images",)
LINK = re.compile(
    r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)"
    r"|(?P<image>!\[[^\]]*\]\(|<img src=\")(?P<source>[^)\"\s]+)"
)
logger = logging.getLogger("mkdocs.hooks.docs_pages")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages, and the images that they show."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(REPOSITORY / source).read_text(encoding="utf-8")))
    for folder in IMAGES:
        for path in sorted((REPOSITORY / folder).iterdir()):
            files.append(File.generated(config, f"{folder}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with its links as the site has them."""
    here = {site: source for source, site in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewritten(match: re.Match) -> str:
        target = match["target"] or match["source"]
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        if not (REPOSITORY / place).exists():
            logger.warning("%s links to '%s', which does not exist", here, target)
            return match[0]
        if place in PAGES:
            site = PAGES[place]
        elif place.startswith(("docs/", *IMAGES)):
            site = place.removeprefix("docs/")
        else:
            return match["text"] or ""
        relative = posixpath.relpath(site, posixpath.dirname(page.file.src_uri) or ".") + ("#" + anchor) * bool(anchor)
        return f"[{match['text']}]({relative})" if match["target"] else match["image"] + relative

    # Code blocks stay as they are.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)
