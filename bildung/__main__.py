"""`python -m bildung` is `bildung`."""

from bildung.app.cli import main

main()
