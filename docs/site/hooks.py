"""Hooks of MkDocs: README.md and data/README.md are pages of the site, read where they lie, with links mended."""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
BROUGHT = {"index.md": ROOT / "README.md", "data.md": ROOT / "data" / "README.md"}
# Links as they are in the repository -> as they are in the site.
LINKS = {
    "index.md": {"docs/": "", "data/README.md": "data.md"},
    "data.md": {"../docs/": "", "../README.md": "index.md"},
}
OTHERS = {"../data/README.md": "data.md", "../README.md": "index.md"}


def on_config(config):
    """Pages of docs/ that mkdocs.yml does not name come under "Using models"."""
    named = str(config.nav)
    using = next(section["Using models"] for section in config.nav if "Using models" in section)
    using += [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in named]
    return config


def on_files(files, config):
    """Adds the pages that lie outside of docs/."""
    for name, path in BROUGHT.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites the links of a page."""
    for before, after in LINKS.get(page.file.src_uri, OTHERS).items():
        markdown = re.sub(rf"\]\({re.escape(before)}", f"]({after}", markdown)
    return markdown
