"""Hooks of mkdocs: pages of the site link to files of the repository, which become pages themselves.

`docs/` is also read on a code host, where `../ARCHITECTURE.md` or `../configs/quickstart_sft.py` lead somewhere. The
site has no folder but its own: files outside `docs/` that a page links to, and what these link to, are added under
`repository/`, Markdown as pages, others as listings.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
"""The path in a Markdown link or picture: not an address, not an anchor of the page itself."""
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
HAN, STOPS = r"\u4e00-\u9fff", "，。；：、）”"
WRAPPED = re.compile(rf"(?<=[{HAN}])\n *(?=[{HAN}（“])|(?<=[{STOPS}])\n *(?=[^\W\d]|[（“\[]|`(?!``))")
"""A line break within a paragraph of Chinese, which browsers show as a space."""
LISTINGS = {
    ".py": "python",
    ".json": "json",
    ".jsonl": "json",
    ".yml": "yaml",
    ".toml": "toml",
    ".jinja": "jinja",
}


def site_path(path: str) -> str:
    """Where the site has a file of the repository, both relative to their roots."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def repository_path(src_uri: str) -> str:
    """The file of the repository that a page of the site shows."""
    if not src_uri.startswith("repository/"):
        return f"docs/{src_uri}"
    path = src_uri.removeprefix("repository/")
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def targets(path: str) -> set[str]:
    """The files of the repository that a Markdown file of it links to."""
    links = LINK.findall((ROOT / path).read_text(encoding="utf-8"))
    resolved = {posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in links}
    return {target for target in resolved if (ROOT / target).is_file()}


def content(path: str) -> str:
    """A file of the repository as Markdown."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    language = LISTINGS.get(Path(path).suffix, "text")
    return f"# {path}\n\n````{language}\n{text}\n````\n"


def joined(markdown: str) -> str:
    """Chinese without the line breaks that browsers show as spaces, outside code."""
    parts = FENCED.split(markdown)
    return "".join(part if part.startswith("```") else WRAPPED.sub("", part) for part in parts)


@event_priority(-100)  # after the plugin of languages, which expects files on disk
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in all that pages link to outside docs/."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    known = set(waiting)
    while waiting:
        new = targets(waiting.pop()) - known
        known |= new
        for path in sorted(path for path in new if not path.startswith("docs/")):
            files.append(File.generated(config, site_path(path), content=content(path)))
            if path.endswith(".md"):
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to the site's pages."""
    path = repository_path(page.file.src_uri)
    if not path.endswith(".md"):
        return markdown
    here = posixpath.dirname(page.file.src_uri)

    def rewritten(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
        return posixpath.relpath(site_path(target), here or ".") if (ROOT / target).is_file() else link[1]

    linked = LINK.sub(rewritten, markdown)
    return joined(linked) if path.endswith(".zh.md") else linked
