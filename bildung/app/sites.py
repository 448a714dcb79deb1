"""Where one can look into a model and change it: the names and shapes of its activation sites."""

from __future__ import annotations

from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from bildung.core.settings import settings


@settings
class Command:
    directory: tyro.conf.Positional[Path]  # a model or adapter directory, or a .gguf file


def command(settings: Command) -> None:
    """`bildung sites DIR`."""
    import bildung  # here, not above: `bildung --help` must not wait for torch

    table = Table(box=None)
    table.add_column("site")
    table.add_column("shape")
    for site, shape in bildung.sites(bildung.load(settings.directory).model).items():
        table.add_row(site, shape)
    Console(highlight=False).print(table)
