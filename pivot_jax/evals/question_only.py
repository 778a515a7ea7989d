"""Baselines that see only the question, never the image.

An accuracy on visual questions means little until it is set beside these. Not
for the other half of the control, a model that sees a wrong picture: that one
needs a model.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from pivot_jax import texts

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class QuestionOnly:
  """The most frequent answer to each question, and to each kind of question.

  Questions, kinds and answers are in their canonical form.
  """

  by_question: Mapping[str, str]
  by_kind: Mapping[str, str]

  def answer(self, question: str, kind: str) -> str:
    """Return the answer to a question; its kind's if it was never seen."""
    asked = texts.canonical(question)
    if asked in self.by_question:
      return self.by_question[asked]
    return self.by_kind.get(texts.canonical(kind), "")


def fit(rows: Iterable[Row]) -> QuestionOnly:
  """Learn from rows with `question`, `kind` and `answer`."""
  rows = list(rows)
  return QuestionOnly(
    by_question=_most_frequent(
      (row["question"], row["answer"]) for row in rows
    ),
    by_kind=_most_frequent((row["kind"], row["answer"]) for row in rows),
  )


def accuracy(
  model: QuestionOnly, rows: Iterable[Row], *, by: str
) -> dict[str, tuple[int, int]]:
  """Return (right, asked) for each value of the column `by`.

  Args:
    model: what `fit` returned.
    rows: rows with `question`, `kind`, `answer` and the column.
    by: "category" or "kind".
  """
  counts = {}
  for row in rows:
    group = texts.canonical(row[by])
    right, asked = counts.get(group, (0, 0))
    guess = model.answer(row["question"], row["kind"])
    right += guess == texts.canonical(row["answer"])
    counts[group] = (right, asked + 1)
  return counts


def _most_frequent(pairs):
  counts = collections.defaultdict(collections.Counter)
  for key, answer in pairs:
    counts[texts.canonical(key)][texts.canonical(answer)] += 1
  # Ties go to the first in the alphabet: the order of rows must not matter.
  return {
    key: min(answers, key=lambda answer: (-answers[answer], answer))
    for key, answers in counts.items()
  }
