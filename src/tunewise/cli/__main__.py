"""Lets `python -m tunewise.cli` do what `tunewise` does."""

from __future__ import annotations

from tunewise.cli import main

main()
