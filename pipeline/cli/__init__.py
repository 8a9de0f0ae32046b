"""The `retort` command: the one room that looks up, when a stage is asked for. `settings` puts the configuration together."""

from pipeline.cli.main import main as main
