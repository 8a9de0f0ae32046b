"""`retort task`: from the schema and the prompt that people have to a task."""

from __future__ import annotations

import os
from pathlib import Path

import click

from pipeline.base import storage
from pipeline.base.console import say
from pipeline.base.errors import UserError


@click.command()
@click.option("--schema", required=True, metavar="FILE|MODULE:MODEL", help="JSON Schema of an answer, or a Pydantic model.")
@click.option("--instruction", required=True, metavar="FILE|TEXT", help="What the teacher is told, before each text.")
@click.option("--teacher", metavar="MODEL", help="The task's, by name or path; an API's or a log's may be named later.")
@click.option("--out", required=True, metavar="FILE", help="The task to write; its name is the file's.")
def task(schema: str, instruction: str, teacher: str | None, out: str) -> None:
    """A task from a JSON Schema or a Pydantic model.

    \b
      retort task --schema answer.schema.json --instruction prompt.txt --out tasks/triage.yaml
      retort task --schema app.models:Triage --instruction "Sort this mail." --out tasks/triage.yaml

    Objects, enum, const, booleans, null, bounded integers, anyOf of such, lists, optional members and $ref are taken as they
    are. What allows answers without end, or is not known, is refused by its place in the schema. A task may also name a schema
    itself, as `schema: answer.schema.json` in place of `fields`.
    """  # noqa: D301 (\b is click's mark, as a character)
    from pipeline.task.json_schema import content_of, model_schema, read_schema
    from pipeline.task.task_file import dump_task, make_task

    if storage.exists(out):
        raise UserError(f"{out} is there already: name another file with --out")
    text = Path(instruction).read_text("utf-8").strip() if os.path.isfile(instruction) else instruction
    is_model = ":" in schema and not os.path.exists(schema) and not storage.is_uri(schema)
    content = content_of(model_schema(schema) if is_model else read_schema(schema))
    made = make_task(content | {"name": Path(out).stem, "teacher": teacher, "instruction": text}, "this schema")
    storage.write_text(out, dump_task(made, short=True))
    kinds = {name: "labels, a list" if name in made.lists else "values" for name in made.fields}
    say("\n".join([f"{name}: {len(values)} {kinds[name]}" for name, values in made.fields.items()]))
    say(f"task     {out}, {made.outputs:,} answers")
