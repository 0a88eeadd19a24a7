"""Hooks of mkdocs: the README is the site's first page."""

import re
from pathlib import Path

from mkdocs.structure.files import File


REPOSITORY = "https://github.com/diffusers-hdit/diffusers-hdit/blob/main/"


def on_files(files, config):
    """Add the README as index.md, with links into docs/ made relative and other relative links pointing to GitHub."""
    readme = (Path(config.config_file_path).parent / "README.md").read_text()
    readme = re.sub(r"\]\((?!https?:|#|docs/)", f"]({REPOSITORY}", readme).replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    return files
