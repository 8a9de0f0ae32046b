"""The part of the `retort` command that puts a student to work: `predict`, `serve` and `export`."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from pipeline import storage
from pipeline.console import console
from pipeline.options import configure, folder_of, read_settings, stage_options

SHARE = click.FloatRange(0, 1)


@click.command()
@click.option("--student", metavar="DIR", help="Folder of the student; by default OUT/student.")
@click.option("--format", "answers_format", type=click.Choice(["jsonl", "parquet"]), help="Of the answers; by default jsonl.")
@click.option("--probabilities", is_flag=True, help="Write the share of every value of every field too.")
@click.option(
    "--workers", "predict_workers", type=click.IntRange(1), help="Under Ray Data; by default as the comments are many."
)
@click.option("--teacher", "predict_teacher", metavar="MODEL", help="Whom to ask where the student is unsure.")
@click.option("--fallback", "predict_fallback", type=SHARE, help="Confidence below which the teacher's answer is taken.")
@stage_options("comments", "limit")
def predict(student: str | None, **options: Any) -> None:
    """Comments through the student to answers, in OUT/predict/answers.

    \b
      retort predict --student runs/first/student --comments new.jsonl --out runs/new
      retort predict --student s3://models/first --comments 's3://data/*.parquet' --out s3://data/answers --format parquet

    Every comment has one answer, or one line in OUT/predict/comments/set_aside.jsonl that says why not. `confidence` is how
    likely the student finds its answer, calibrated once `retort evaluate` has run. The same command goes on with a
    prediction that was killed; `retort score` reads the answers as they are.

    With --teacher MODEL --fallback 0.6, answers below that confidence are the teacher's; the report of `retort evaluate` says
    how many that would be, and what the others are worth.
    """  # noqa: D301 (\b is click's mark, as a character)
    from student.predict import ANSWERS
    from student.predict import predict as stage

    config, out = configure(**options)
    folder = folder_of(None, out, "predict")
    done = stage(config, folder_of(student, out, "student"), folder)
    console.print(
        f"{done['answers']:,} answers in {storage.join(folder, ANSWERS)}, {done['set_aside']:,} rows set aside",
        highlight=False,
        soft_wrap=True,
    )


@click.command()
@click.option("--student", metavar="DIR", help="Folder of the student; by default OUT/student.")
@click.option("--host", metavar="ADDRESS", help="Where to listen; by default 127.0.0.1, which other machines cannot reach.")
@click.option("--port", type=click.IntRange(0, 65535), help="By default 8000; 0 takes a free one and prints it.")
@click.option("--teacher", "serve_teacher", metavar="MODEL", help="Load this teacher too, to compare and to fall back on.")
@click.option("--fallback", "serve_fallback", type=SHARE, help="Confidence below which the teacher's answer is taken.")
@stage_options()
def serve(student: str | None, **options: Any) -> None:
    """The student as an HTTP service, with a page to try it.

    \b
      retort serve --student runs/first/student
      curl http://127.0.0.1:8000/classify -H 'Content-Type: application/json' -d '{"text": "I love it"}'
      curl http://127.0.0.1:8000/classify -H 'Content-Type: application/json' -d '{"texts": ["I love it", "not for me"]}'

    Requests that come at the same time are decoded together. A browser shows the page at the same address; /openapi.json
    describes every route, /healthz is for probes and /metrics for Prometheus. Programs that ask a teacher through OpenAI's
    client can ask the student instead:

    \b
      client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
      client.chat.completions.create(model="student", messages=[{"role": "user", "content": "I love it"}])

    With a teacher beside it, the unsure answers can be the teacher's, and "source" says whose each is:

    \b
      retort serve --out runs/first --teacher MODEL --fallback 0.6

    Nobody is asked for a password: let nothing but your own network reach another --host, and list the names under which it
    is asked there: --set 'serve.hosts=[students.example.org]'. Ctrl-C or SIGTERM answers what is in flight, then ends.
    """  # noqa: D301 (\b is click's mark, as a character)
    from student.serve.server import serve as stage

    config = read_settings(**options)
    stage(config, folder_of(student, config.out, "student"))


@click.command()
@click.option("--student", metavar="DIR", help="Folder of the student; by default OUT/student.")
@click.option("--shards", metavar="DIR", help="Folder of logit shards; by default OUT/shards.")
@stage_options()
def export(student: str | None, shards: str | None, **options: Any) -> None:
    """The student for programs without Retort, in OUT/export.

    \b
      retort export --out runs/first
      python runs/first/export/answer.py "I love it"

    The folder holds answer.py, which needs PyTorch and nothing of Retort; student.onnx, the whole decoding as one graph for
    ONNX Runtime in any language; student.int8.onnx, a third of its size; and a model card. Each is run on the test comments
    and held against the teacher and the student, in export.json; nothing is written if the graph answers otherwise than the
    student does. Run `retort evaluate` first: it calibrates the confidence, and the card tells what the report found.
    """  # noqa: D301 (\b is click's mark, as a character)
    from student.answers import REFERENCES
    from student.export.export import export as stage

    config, out = configure(**options)
    folders = (folder_of(shards, out, "shards"), folder_of(student, out, "student"), folder_of(None, out, "report"))
    folder = folder_of(None, out, "export")
    figures = stage(config.evaluate, *folders, folder)
    agreement = f"agreement with {REFERENCES[figures['answers']].name}"
    table = Table("export", "size", agreement, "with the student", box=None)
    for form in figures["formats"].values():
        shares = (f"{100 * form[other]['whole']:.2f} %" for other in ("teacher", "student"))
        table.add_row(form["name"], f"{form['bytes'] / 1e6:,.1f} MB", *shares)
    console.print(table)
    console.print(f"export   {folder}", markup=False, highlight=False, soft_wrap=True)
