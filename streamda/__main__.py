"""``python -m streamda`` is the command line."""

from streamda.cli import main

main()
