"""Files outside docs/ that pages name become pages of the site, or links to the repository."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the reports and pictures of benchmarks/results/, how to contribute, and the changes."""
    reports = [p for p in (ROOT / 'benchmarks/results').rglob('*') if p.suffix in {'.md', '.png'}]
    for path in [ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md', *sorted(reports)]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links as they hold in the repository into links as they hold on the site."""
    uri = page.file.src_uri
    outside = uri.startswith('benchmarks/') or uri in {'CONTRIBUTING.md', 'CHANGELOG.md'}
    folder = posixpath.dirname(uri if outside else f'docs/{uri}')

    def on_site(match: re.Match[str]) -> str:
        name, hash_, anchor = match[1].partition('#')
        path = posixpath.normpath(posixpath.join(folder, name))
        target = path.removeprefix('docs/')
        if not (ROOT / path).exists() or target == name:
            return match[0]  # a page beside it, or nothing: mkdocs says so
        if files.get_file_from_path(target) is None:
            return f']({config.repo_url}/blob/main/{path}{hash_}{anchor})'
        return f']({posixpath.relpath(target, posixpath.dirname(uri) or ".")}{hash_}{anchor})'

    return re.sub(r'\]\((?![a-z]+:|#|/)([^)\s]+)\)', on_site, markdown)
