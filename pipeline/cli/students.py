"""The commands of `student`: training, the report, and what a student is put to."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from pipeline.base import storage
from pipeline.base.console import console, say
from pipeline.base.errors import UserError
from pipeline.cli.options import (
    AGREE,
    AGREE_FIELDS,
    SHARE,
    UNFAMILIAR,
    configure,
    folder_of,
    planned_shape,
    read_settings,
    setting,
    stage_options,
)
from pipeline.cli.output import show_comparison, show_report


@click.command()
@setting("ladder.rungs", "--ladder", metavar="RUNGS", help="Students to train, by default ngrams,own,teacher.")
@setting("ladder.readers", "--reader", multiple=True, metavar="MODEL", help="A pretrained model, for one more student.")
@setting("comments.answer", "--answers", metavar="COLUMNS", help="Answers you have, see `retort import`: no teacher is asked.")
@stage_options("max_cost", "max_calls", "task", "teacher", "comments", "limit")
def run(**options: Any) -> None:
    """Everything: extract, train, evaluate, and a summary.

    Trains a student for each rung of a ladder in OUT/ladder: one of hashed words where answers are few, one of random weights,
    and half of the teacher where it is a Gemma 3 model. Takes the one with the best agreement on validation texts, less
    half a point for each doubling of its time for an answer.

    \b
      retort run ... --answers label                                     from answers in the files, without a teacher
      retort run ... --set teacher.engine=openai --set teacher.url=URL   from an API
      retort run ... --ladder own                                        a single student
      retort run ... --reader sentence-transformers/all-MiniLM-L6-v2     a pretrained one beside the others
      retort run ... --set ladder.minutes=60                             more time for each
    """  # noqa: D301 (\b is click's mark, as a character)
    from pipeline.extract.stage import make_shards
    from student.evaluate.evaluate import FIGURES
    from tune.search.ladder import climb, require_readers

    config, out = configure(**options)
    shape, given = planned_shape(config), config.comments.answer is not None
    if shape and (given or config.extract.capture == "choices") and shape.sequence == "full":
        raise UserError(
            "a student of whole answers needs the logits of all steps: set student.sequence=choices, or extract.capture=all"
        )
    if shape:
        require_readers(config.ladder, shape)
    make_shards(config)
    shards, student, report = (folder_of(None, out, name) for name in ("shards", "student", "report"))
    trained, why = climb(config, shards, out)
    show_report(storage.read_json(storage.join(report, FIGURES)), shards, student, report, trained.mlflow.uri)
    say(why)


@click.command()
@click.option("--shards", multiple=True, metavar="DIR", help="Folder of logit shards; by default OUT/shards. May be repeated.")
@setting("student.reader", "--reader", metavar="MODEL", help="What reads texts: own, ngrams, or a pretrained model.")
@setting(
    "train.init", "--init", metavar="DIR", help="Start from this student's weights, and with its shape; see `retort prune`."
)
@stage_options()
def train(shards: tuple[str, ...], **options: Any) -> None:
    """Logit shards to a student, in OUT/student. Several folders of one task are joined in OUT/shards first.

    Every choice is a key of the configuration. Some, with --set:

    \b
      train.objective=temperature   curriculum, hard-label, temperature, topk, slim, reverse-kl
      student.sequence=choices      leave forced tokens out: a third of the length, and of the time
      student.layers=4 student.width=256 student.heads=4 student.mlp=1024
      train.epochs=10 train.batch_size=64 train.learning_rate=0.001 student.dropout=0.1
      train.workers=4 train.strategy=zero2 train.precision=bf16 train.accumulation=2

    Ctrl-C saves and stops; the same command goes on, as it does after a crash.
    """  # noqa: D301 (\b is click's mark, as a character)
    from pipeline.shards.join import join
    from student.train.train import train as stage

    config, out = configure(**options)
    if len(shards) > 1:
        join([storage.absolute(folder) for folder in shards], folder_of(None, out, "shards"))
        shards = ()
    stage(config, folder_of(next(iter(shards), None), out, "shards"), folder_of(None, out, "student"))


@click.command()
@click.option("--shards", metavar="DIR", help="Folder of logit shards; by default OUT/shards.")
@click.option("--student", metavar="DIR", help="Folder of the student; by default OUT/student.")
@AGREE
@AGREE_FIELDS
@UNFAMILIAR
@click.option("--certify-on", metavar="DIR", help="Shards of other texts to certify on, instead of the test split.")
@stage_options()
def evaluate(shards: str | None, student: str | None, certify_on: str | None, **options: Any) -> None:
    """The student's fidelity on test texts, in OUT/report.

    \b
      retort evaluate --out runs/first --agree 0.95
      retort evaluate --out runs/first --agree 0.95 --certify-on runs/later/shards

    With --agree it says to how many texts the student may answer alone, so that with 95 % confidence so large a share of its
    answers is the teacher's, and leaves that certificate beside the student. It holds for texts like those that it was
    measured on. Nothing that has chosen anything certifies: neither training nor validation texts.
    """  # noqa: D301 (\b is click's mark, as a character)
    from student.evaluate.evaluate import evaluate as stage

    config, out = configure(**options)
    folders = (folder_of(shards, out, "shards"), folder_of(student, out, "student"), folder_of(None, out, "report"))
    figures = stage(config.floors, config.train, *folders, config.answer, certify_on)
    show_report(figures, *folders)
    if config.answer.certified:
        asked = figures["certificates"][-1]
        if asked["refusal"]:
            raise UserError(asked["refusal"])
        say(asked["certificate"]["says"])


@click.command()
@setting("prune.source", "--from", metavar="MODEL", help="A student's folder, or a Gemma 3 model by name or path.")
@click.option("--shards", metavar="DIR", help="Folder of logit shards; by default OUT/shards.")
@setting(
    "prune.fraction", "--fraction", metavar="PART", help="Share of the parameters to keep, such as 1/4, embedding included."
)
@setting("prune.params", "--params", type=click.IntRange(1), help="The same as a number.")
@setting(
    "prune.chain",
    "--chain",
    metavar="PARTS",
    help="Several shares, as 1/2,1/4,1/8: each student cut from the one before, and trained.",
)
@stage_options()
def prune(shards: str | None, **options: Any) -> None:
    """A smaller student cut from a trained model, in OUT/pruned, to train further.

    Keeps the attention heads, neurons, channels and layers that matter most on training texts, and shows in a page how
    much each of them does. The model is a student, or a Gemma 3 model: the teacher itself, or a smaller sibling of it.

    \b
      retort prune --from runs/first/student --shards runs/first/shards --out runs/half --fraction 1/2
      retort prune --from google/gemma-3-1b-it --shards runs/first/shards --out runs/small --set prune.width=512
      retort train --init runs/half/pruned --shards runs/first/shards --out runs/half

    With --chain, each student is trained and evaluated before the next is cut from it, in OUT/chain; the same command goes
    on with a chain that was stopped, and `retort compare` shows all of them.
    """  # noqa: D301 (\b is click's mark, as a character)
    config, out = configure(**options)
    folder = folder_of(shards, out, "shards")
    if config.prune.chain:
        from pipeline.base.tracking import tracking_uri
        from tune.compare.page import compare_runs
        from tune.search.chain import run_chain

        chained = storage.join(out, "chain")
        run = run_chain(config, folder, chained)
        store = tracking_uri(config.tracking.uri, out)
        show_comparison(compare_runs(store, config.tracking.experiment, chained, run, by=["pruned.fraction"]), chained)
        return
    from student.prune.prune import prune as stage

    pruned = storage.join(out, "pruned")
    stage(config.prune, config.train, config.student, folder, pruned)
    console.print(f"student  {pruned}\nwhat matters in its source   {storage.join(pruned, 'importance.html')}", highlight=False)
    place = f"{out}-pruned" if storage.exists(storage.join(out, "student", "train.json")) else out  # never over another student
    say(f"train it retort train --init {pruned} --shards {folder} --out {place}")


@click.command()
@click.option("--student", metavar="DIR", help="Folder of the student; by default OUT/student.")
@setting("predict.format", "--format", type=click.Choice(["jsonl", "parquet"]), help="Of the answers; by default jsonl.")
@setting("predict.probabilities", "--probabilities", is_flag=True, help="Write the share of every value of every field too.")
@setting("predict.workers", "--workers", type=click.IntRange(1), help="Under Ray Data; by default as the texts are many.")
@setting("answer.teacher", "--teacher", metavar="MODEL", help="Whom to ask where the student is unsure.")
@setting("answer.fallback", "--fallback", type=SHARE, help="Confidence below which the teacher's answer is taken.")
@AGREE
@AGREE_FIELDS
@UNFAMILIAR
@stage_options("max_cost", "max_calls", "comments", "limit")
def predict(student: str | None, **options: Any) -> None:
    """Texts through the student to answers, in OUT/predict/answers.

    \b
      retort predict --student runs/first/student --comments new.jsonl --out runs/new
      retort predict --student s3://models/first --comments 's3://data/*.parquet' --out s3://data/answers --format parquet

    Every text has one answer, or one line in OUT/predict/comments/set_aside.jsonl that says why not. `confidence` is how
    likely the student finds its answer, calibrated once `retort evaluate` has run. The same command goes on with a
    prediction that was killed; `retort score` reads the answers as they are.

    With --teacher MODEL --agree 0.95, the teacher answers where it must, so that with 95 % confidence at least 95 % of the
    student's own answers are the teacher's; --fallback 0.6 has it answer below that confidence. --unfamiliar 0.02 gives it
    the texts that are stranger than 98 % of held-out ones too. The teacher may be behind an API, as in `retort extract`; what
    it answers is kept in OUT/predict/asked, and paid for once.
    """  # noqa: D301 (\b is click's mark, as a character)
    from student.predict.predict import ANSWERS
    from student.predict.predict import predict as stage

    config, out = configure(**options)
    folder = folder_of(None, out, "predict")
    done = stage(config, folder_of(student, out, "student"), folder)
    say(f"{done['answers']:,} answers in {storage.join(folder, ANSWERS)}, {done['set_aside']:,} rows set aside")


@click.command()
@click.option("--student", metavar="DIR", help="Folder of the student; by default OUT/student.")
@setting(
    "serve.host", "--host", metavar="ADDRESS", help="Where to listen; by default 127.0.0.1, which other machines cannot reach."
)
@setting("serve.port", "--port", type=click.IntRange(0, 65535), help="By default 8000; 0 takes a free one and prints it.")
@setting("answer.teacher", "--teacher", metavar="MODEL", help="Load this teacher too, to compare and to fall back on.")
@setting("answer.fallback", "--fallback", type=SHARE, help="Confidence below which the teacher's answer is taken.")
@AGREE
@AGREE_FIELDS
@UNFAMILIAR
@setting("serve.audit", "--audit", type=SHARE, help="Share of the student's own answers to ask the teacher about too.")
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
      retort serve --out runs/first --teacher MODEL --agree 0.95 --unfamiliar 0.02 --audit 0.01

    Texts stranger than 98 % of held-out ones are then the teacher's too. It is also asked about a hundredth of what the
    student answers alone: both answers are in OUT/serve/audited.jsonl, and the page and /metrics raise an alarm when it
    agrees less often than certified. All that the teacher answers is in OUT/serve/shards, for `retort train`.

    Before it listens elsewhere than on loopback, give it a key and a certificate, and the names under which it is asked:

    \b
      export STUDENT_KEY=...
      retort serve --out runs/first --host 0.0.0.0 --set serve.key=STUDENT_KEY --set serve.certificate=cert.pem \\
          --set serve.private_key=key.pem --set 'serve.hosts=[students.example.org]'

    Ctrl-C or SIGTERM answers what is in flight, then ends.
    """  # noqa: D301 (\b is click's mark, as a character)
    from student.serve.server import serve as stage

    config = read_settings(**options)
    kept = folder_of(None, config.out, "serve") if config.out else None
    stage(config, folder_of(student, config.out, "student"), kept)


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
    ONNX Runtime in any language; student.int8.onnx, a third of its size; and a model card. Each is run on the test texts
    and held against the teacher and the student, in export.json; nothing is written if the graph answers otherwise than the
    student does. Run `retort evaluate` first: it calibrates the confidence, and the card tells what the report found.
    """  # noqa: D301 (\b is click's mark, as a character)
    from student.data.answers import REFERENCES
    from student.export.export import export as stage

    _, out = configure(**options)
    folders = (folder_of(shards, out, "shards"), folder_of(student, out, "student"), folder_of(None, out, "report"))
    folder = folder_of(None, out, "export")
    figures = stage(*folders, folder)
    agreement = f"agreement with {REFERENCES[figures['answers']].name}"
    table = Table("export", "size", agreement, "with the student", box=None)
    for form in figures["formats"].values():
        shares = (f"{100 * form[other]['whole']:.2f} %" for other in ("teacher", "student"))
        table.add_row(form["name"], f"{form['bytes'] / 1e6:,.1f} MB", *shares)
    console.print(table)
    say(f"export   {folder}")
