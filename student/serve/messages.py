"""Requests and answers of `/classify` and `/task`, as the API's description has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, StrictBool, WithJsonSchema, model_validator

from pipeline.base.config import Strict
from pipeline.task.lists import ListRule
from pipeline.task.task import CommentRules, Task
from pipeline.task.values import Scalar
from student.predict.teacher import State
from student.serve.service import Result, Service

# anything else is set aside, not refused with all the others; an object has the columns of the task's input
Text = Annotated[Any, WithJsonSchema({"type": ["string", "object"]})]

EXAMPLES = [{"text": "I love it"}, {"texts": ["I love it", "not for me"], "probabilities": False}]


class ClassifyRequest(Strict):
    """One text, or several."""

    text: Text = Field("", description="instead of texts: one")
    texts: list[Text] = Field([], description="instead of text: any number up to the limit that /task tells")
    probabilities: StrictBool = Field(True, description="tell the share of every value too")
    teacher: StrictBool = Field(False, description="tell the teacher's answer too")

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > len(cls.model_fields):  # each unknown one would be an error of its own
            raise ValueError(f"{len(data):,} keys: there are only {', '.join(cls.model_fields)}")
        return data

    @model_validator(mode="after")
    def _either(self) -> Self:
        if len(self.model_fields_set & {"text", "texts"}) != 1:
            raise ValueError('send either "text", a string, or "texts", a list of them')
        return self

    @property
    def all_texts(self) -> list[Any]:
        """However many there are."""
        return [self.text] if "text" in self.model_fields_set else self.texts


class Share(BaseModel):
    """How likely a value is to the student, given its answers to the fields before; a label, how likely it is in the list."""

    value: Scalar
    share: float


Answered = dict[str, Scalar | list[Scalar] | dict[str, Any]]  # with the objects inside it


class ResultBody(BaseModel):
    """What became of one text."""

    answer: Answered | None = Field(description="by field; null for a text that the task's filters set aside")
    confidence: float | None = Field(description="of the student: the product of its choices' probabilities")
    familiarity: float | None = Field(None, description="share of held-out texts no more like the training's, where asked for")
    probabilities: dict[str, list[Share]] | None = Field(None, description="of the student, by field, in the task's order")
    source: Literal["student", "teacher"] | None = Field(description="whose answer it is")
    reason: str | None = Field(description="why there is none; its first word is malformed, too_short, too_long, …")
    teacher: Answered | None = Field(None, description="the teacher's, if wanted; null where it gave none in time")


class ClassifyResponse(BaseModel):
    """The results, in the order of the texts."""

    results: list[ResultBody]


class TeacherBody(BaseModel):
    """The teacher beside the student."""

    model: str
    state: State


class AuditBody(BaseModel):
    """What the teacher says to the latest of the student's own answers that it was asked about."""

    audited: int
    agreement: float
    low: float = Field(description="of its 95 % interval")
    high: float
    alarm: str | None = Field(description="what is wrong, where it agrees less often than certified")


class TaskBody(BaseModel):
    """What the student does."""

    name: str
    instruction: str = Field(description="the teacher's; the student reads nothing but the comment")
    fields: dict[str, list[Scalar]] = Field(description="every field's allowed values")
    columns: list[str] = Field(description="what a text may be an object of, and is joined from; none where it is one string")
    lists: dict[str, ListRule] = Field(description="the fields that are a list of some of their values")
    nesting: str | None = Field(description="what parts the keys in the name of a field that is in an object inside the answer")
    comments: CommentRules = Field(description="which comments are answered; lengths are in tokens")
    max_texts: int
    max_bytes: int
    thresholds: dict[str, float] = Field(
        description="below which the teacher answers: confidence in a field or the whole answer, or the text's familiarity"
    )
    audit: AuditBody | None
    certificate: str | None = Field(description="what is certified of the answers that the student gives alone")
    teacher: TeacherBody | None


def result_body(result: Result, request: ClassifyRequest, task: Task) -> dict[str, Any]:
    """A `ResultBody`, with what the request wants."""
    answer = result.answer
    body: dict[str, Any] = {
        "answer": task.nested(result.values) if result.values else None,
        "confidence": answer.confidence if answer else None,
        "source": result.source if answer else None,
        "reason": result.row.set_aside,
    }
    if request.probabilities:
        body["probabilities"] = answer.probabilities(task.fields) if answer else None
    if answer and answer.familiarity is not None:
        body["familiarity"] = answer.familiarity
    if request.teacher:
        body["teacher"] = task.nested(result.teacher) if result.teacher else None
    return body


def task_body(service: Service) -> TaskBody:
    """Of a service."""
    task, config, teacher = service.task, service.config, service.teacher
    return TaskBody(
        name=task.name,
        instruction=task.instruction,
        fields=task.fields,
        columns=task.columns,
        lists=task.lists,
        nesting=task.format.nesting,
        comments=task.comments,
        max_texts=config.max_texts,
        max_bytes=config.max_bytes,
        thresholds=service.thresholds,
        audit=AuditBody(**service.audit.about()) if service.audit else None,
        certificate=str(service.certificate) if service.certificate else None,
        teacher=TeacherBody(model=teacher.name, state=teacher.state) if teacher else None,
    )
