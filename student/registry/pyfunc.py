"""The script MLflow keeps with a logged student and runs to load it, on the packages kept beside it.

Models from code: nothing is pickled, and the weights are safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from pipeline.comments.reading import KEPT, filter_rows, text_row
from student.decode.answerer import Answerer

COLUMNS = ["answer", "confidence", "reason"]


class StudentModel(PythonModel):
    """Comments to answers, as `retort predict` gives them."""

    def load_context(self, context: Any) -> None:
        """Reads the student among the model's artifacts, onto a GPU where there is one."""
        self._answerer = Answerer.load(context.artifacts["student"])
        self._compiled = self._answerer.compiled

    def predict(self, model_input: pd.DataFrame) -> pd.DataFrame:
        """Answers comments.

        Args:
            model_input: its column `text` holds them.

        Returns:
            One row a comment, in order and under its index. `answer` is a JSON object and `confidence` the product of the
            probabilities of the choices made. Both are null for a comment that the task's filters set aside; `reason` then
            starts with the word under which `retort predict` counts it, such as `too_long`.
        """
        column = model_input["text"]
        texts = column.astype(object).where(column.notna(), None).tolist()  # pandas may hold null as NaN, a float
        # dtype object keeps None: as NaN, MLflow's server would write it into its JSON, where there is no such value
        return pd.DataFrame(list(self._records(texts)), columns=COLUMNS, index=model_input.index, dtype=object)

    def _records(self, texts: list[Any]) -> Iterator[tuple[str | None, float | None, str | None]]:
        rows = [text_row(i, self._compiled.task.text_of(text)) for i, text in enumerate(texts)]
        marked = filter_rows(rows, self._compiled.task.comments, self._compiled.tokenizer)
        answers = iter(self._answerer.answer([row for row in marked if row.status == KEPT]))
        for row in marked:
            if row.status == KEPT:
                answer = next(answers)
                yield json.dumps(self._compiled.task.nested(answer.values), ensure_ascii=False), answer.confidence, None
            else:
                yield None, None, row.set_aside


set_model(StudentModel())
