"""Pages that are one file: no server, no network, nothing to install.

Styles and scripts are put into the page, pictures become data URLs, and a content security policy allows the page's
own scripts (by their hash) and nothing else: text written by a model stays text, even if escaping were forgotten.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

HTML = Path(__file__).parent / "html"


def render(template: str, folders: tuple[Path, ...] = (HTML,), script: str | None = None, **values: Any) -> str:
    """The page `template` of one of the folders, with everything it includes; every value is escaped.

    script: the file of the page's own JavaScript, if it has any.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = lambda name: Markup(_find(name, folders))
    environment.globals["script"] = Markup(_find(script, folders)) if script else ""
    environment.globals["policy"] = _policy(_find(script, folders) if script else "")
    return environment.get_template(template).render(values)


def data_url(path: Path) -> str:
    """A PNG as text that an <img> takes."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _find(name: str, folders: tuple[Path, ...]) -> str:
    return next(folder / name for folder in folders if (folder / name).is_file()).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    allowed = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    if not script:
        return allowed
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"{allowed}; script-src 'sha256-{digest}'"
