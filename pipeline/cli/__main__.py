"""`python -m pipeline.cli` is `retort`."""

from pipeline.cli.main import main

main()
