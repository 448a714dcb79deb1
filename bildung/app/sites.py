"""Where one can look into a model and change it: the names and shapes of its activation sites.

    bildung sites DIR                                        all of them
    bildung sites DIR "layers.3.attn.*[:, 5, 2]"             what a pattern with a selection (model/selection.py) means

observe, intervene, `look cache` and steering vectors take the same patterns.
"""

from __future__ import annotations

from pathlib import Path

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bildung.core.settings import settings


@settings
class Command:
    directory: tyro.conf.Positional[Path]  # a model or adapter directory, or a .gguf file
    pattern: tyro.conf.Positional[str] = "*"  # only sites that fit, with the part a selection takes of each


def command(settings: Command) -> None:
    """`bildung sites DIR [PATTERN]`."""
    import bildung  # here, not above: `bildung --help` must not wait for torch
    from bildung.model.taps import match_selections

    table = Table(box=None)
    table.add_column("site")
    table.add_column("shape")
    model = bildung.load(settings.directory).model
    shapes = bildung.sites(model)
    for site, selection in match_selections(model, settings.pattern):
        table.add_row(escape(site + (selection.text if selection else "")), shapes[site])
    Console(highlight=False).print(table)
