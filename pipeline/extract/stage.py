"""Comments to shards, whoever answers: an engine of our own, an API, or someone already has."""

from __future__ import annotations

from pipeline.config import PipelineSettings
from pipeline.extract.endpoint import extract_from_endpoint
from pipeline.extract.extract import extract
from pipeline.extract.given import import_answers
from pipeline.shards.manifest import Manifest


def make_shards(config: PipelineSettings) -> Manifest:
    """Runs the stage that the configuration asks for, in `config.out`, and returns the manifest.

    Raises:
        UserError: anything the user can mend.
        Stopped: a signal, or a budget, ended it early.
    """
    if config.comments.answer is not None:
        return import_answers(config)
    return extract_from_endpoint(config) if config.teacher.engine == "openai" else extract(config)
