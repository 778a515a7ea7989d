"""Tests the question-only baseline, and what it reaches on the scenes."""

import sys

import numpy as np
import pytest

from pivot_jax.data.scenes import scenes
from pivot_jax.evals import question_only


def _row(question, kind, answer, category="c"):
  return {
    "question": question,
    "kind": kind,
    "answer": answer,
    "category": category,
  }


def test_the_most_frequent_answer_wins_and_ties_follow_the_alphabet():
  rows = [_row("q", "k", a) for a in ("b", "a", "c", "c", "b")]
  for order in (rows, rows[::-1]):
    assert question_only.fit(order).answer("q", "k") == "b"
  assert question_only.fit([*rows, _row("q", "k", "c")]).answer("q", "k") == "c"


def test_a_new_question_gets_the_answer_of_its_kind():
  model = question_only.fit([_row("q", "k", "a"), _row("r", "l", "b")])
  assert model.answer("new", "l") == "b"
  assert model.answer("new", "never seen") == ""


def test_accuracy_counts_right_and_asked_by_column():
  model = question_only.fit([_row("q", "k", "a")])
  rows = [
    _row("q", "k", "a", "x"),
    _row("q", "k", "b", "x"),
    _row("q", "k", "a"),
  ]
  assert question_only.accuracy(model, rows, by="category") == {
    "x": (1, 2),
    "c": (1, 1),
  }
  assert question_only.accuracy(model, rows, by="kind") == {"k": (2, 3)}


# What a guess from the question alone can reach: one over the number of
# answers, which follows from every value being drawn uniformly.
CHANCE = {
  "exist": 1 / 2,
  "colour": 1 / 6,
  "texture": 1 / 3,
  "fact": 1 / 10,
  "digit": 1 / 10,
  "letter": 1 / 10,
  "bar": 1 / 6,
  "count": 1 / 4,
  "relation": 1 / 2,
  "size": 1 / 2,
  "where": 1 / 9,
}


@pytest.fixture(scope="module")
def fitted():
  def rows(split, size):
    source = scenes.Scenes(task="eval", split=split, size=size)
    return [source.text(i) for i in range(size)]

  return question_only.fit(rows("train", 20_000)), rows("val", 8_000)


def test_questions_alone_reach_chance_and_no_more_in_each_kind(fitted):
  counts = question_only.accuracy(*fitted, by="kind")
  assert counts.keys() == CHANCE.keys()
  for kind, (right, asked) in sorted(counts.items()):
    sys.stdout.write(f"{kind}: {right / asked:.3f} of {asked}\n")
    # Four standard errors of a guess at chance.
    slack = 4 * np.sqrt(CHANCE[kind] * (1 - CHANCE[kind]) / asked)
    assert abs(right / asked - CHANCE[kind]) <= slack, kind


def test_questions_alone_reach_the_mean_of_chance_in_each_category(fitted):
  counts = question_only.accuracy(*fitted, by="category")
  assert counts.keys() == scenes.EVAL_KINDS.keys()
  for category, (right, asked) in counts.items():
    sys.stdout.write(f"{category}: {right / asked:.3f} of {asked}\n")
    kinds = scenes.EVAL_KINDS[category]
    assert asked == 2000
    # 0.045 is four standard errors of a fair coin over 2,000 questions.
    mean = np.mean([CHANCE[kind] for kind in kinds])
    assert abs(right / asked - mean) <= 0.045, category


def test_texts_are_one_however_their_letters_are_composed():
  composed, parts = "\u00fcber", "u\u0308ber"
  model = question_only.fit(
    [_row(composed, parts, composed), _row(parts, composed, parts)]
    + [_row(composed, "k", "b")]
  )
  for text in (composed, parts):
    # Two of three answers, and not one each.
    assert model.answer(text, "never seen") == composed
    assert model.answer("never asked", text) == composed
  rows = [_row(parts, "k", text, text) for text in (composed, parts)]
  assert question_only.accuracy(model, rows, by="category") == {
    composed: (2, 2)
  }
