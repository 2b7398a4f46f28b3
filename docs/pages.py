"""What mkdocs.yml's site needs beside docs/: pages that lie elsewhere in the repository, links to its files.

Links in the documents are written for the repository, where `../recipes` is a folder that a host's web page
shows. MkDocs calls these functions by their names.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Files of the repository that are pages of the site, and their names there.
PAGES_ELSEWHERE = {
    "benchmarks/RESULTS.md": "results.md",
    "data/corpora/dungeons/README.md": "rooms.md",
    "CHANGELOG.md": "changes.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, name in PAGES_ELSEWHERE.items():
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to other pages lead to them; to other files of the repository, to `repo_url`, or nowhere."""
    homes = {name: path for path, name in PAGES_ELSEWHERE.items() if path != "README.md"}
    home = PurePosixPath(homes.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def lead(link: re.Match) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = normpath(home / target)
        name = PAGES_ELSEWHERE.get(path) or path.removeprefix("docs/")
        if files.get_file_from_path(name) is not None:
            # Names in the site are all in one folder, but those of the API.
            up = "../" * page.file.src_uri.count("/")
            return f"[{text}]({up}{name}{anchor if name != 'index.md' else ''})"
        if not (ROOT / path).exists():
            return link[0]  # MkDocs will complain
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else text

    return LINK.sub(lead, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Pages opened from a disk have no search, which needs a server, but ask for its index as a script."""
    index = Path(config.site_dir) / "search" / "search_index.js"
    index.write_text("var __index = {config: {}, docs: []}\n")
