"""Pages that are one file: no server, no network, nothing to install.

Styles and scripts are put into the page, pictures become data URLs, and a content security policy allows the page's
own scripts (by their hash) and nothing else: text written by a model stays text, even if escaping were forgotten.

The pages of a look share one frame (html/frame.html), one style sheet (look.css) and one script (heat_map.js, look.js:
maps on a canvas and as tables, with the pointer, the keyboard and a region that is read out); `look_page` puts them
together.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import shlex
import zlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from bildung.core.operation import Job

HTML = Path(__file__).parent / "html"


def look_page(template: str, script: str | None = None, **values: Any) -> str:
    """A page that extends frame.html, with the shared script and its own. Needs at least model and command."""
    shared = ("heat_map.js", "look.js")
    return render(template, scripts=(*shared, script) if script else shared, **values)


def command_of(job: Job) -> str:
    """The command line that makes a job's result again: SOURCE OUT and the settings that are not the default ones."""
    words = ["bildung", *job.operation.split(), str(job.source), "OUT", *_flags(job.settings)]
    return " ".join(map(shlex.quote, words))


def _flags(settings: Any, prefix: str = "--") -> list[str]:
    words = []
    for field in dataclasses.fields(settings):
        value, usual = getattr(settings, field.name), field.default
        if usual is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            usual = field.default_factory()
        flag = prefix + field.name.replace("_", "-")
        if value == usual:
            continue
        if dataclasses.is_dataclass(value):
            words += _flags(value, f"{flag}.")
        elif isinstance(value, bool):
            words.append(flag if value else f"{prefix}no-{field.name.replace('_', '-')}")
        elif isinstance(value, str) and value.startswith("-"):
            words.append(f"{flag}={value}")  # or it would be read as a flag
        else:
            words += [flag, *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def packed(steps: bytes) -> str:
    """Bytes as deflated text; look.js has `inflate`."""
    return base64.b64encode(zlib.compress(steps, 6)).decode()


def render(template: str, folders: tuple[Path, ...] = (HTML,), scripts: tuple[str, ...] = (), **values: Any) -> str:
    """The page `template` of one of the folders, with everything it includes; every value is escaped.

    scripts: the files of the page's JavaScript, which become one.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # keys in their order: tables have the same
    environment.globals["asset"] = lambda name: Markup(_find(name, folders))
    script = "\n".join(_find(name, folders) for name in scripts)
    environment.globals["script"] = Markup(script)
    environment.globals["policy"] = _policy(script)
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
