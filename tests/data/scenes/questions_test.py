"""Tests that words alone do not tell a right answer from a wrong one.

A pair that can be told apart without the picture teaches nothing about looking,
so classifiers and counts of words have to stay at chance here.
"""

import collections
import sys

import numpy as np
import pytest
from sklearn import feature_extraction, linear_model

from pivot_jax.data.scenes import counterfactuals, questions, scenes


def test_wrong_captions_use_each_word_as_often_as_right_ones():
  """The paired difference of counts stays within its standard errors."""
  changes = collections.defaultdict(list)
  total = 12_000
  for i in range(total):
    description = scenes._description(0, "words", i)
    wrong, owners = counterfactuals.misname(
      description, np.random.default_rng(i)
    )
    assert wrong != description and owners
    change = collections.Counter(questions.caption(wrong).split())
    change.subtract(questions.caption(description).split())
    for word, count in change.items():
      if count:
        changes[word].append(count)
  assert len(changes) > 50
  for word, counts in changes.items():
    error = np.sqrt(np.sum(np.square(counts)))  # of the sum, if its mean is 0
    # 4.5 errors: about once in 2,000 for all words; these draws do not change.
    assert abs(sum(counts)) <= 4.5 * error, word


def test_wrong_thoughts_use_each_word_as_often_as_right_ones():
  """As above, for each kind of question."""
  source = scenes.Scenes(
    task="preference", split="words", size=12_000, new_fraction=1.0
  )
  changes = collections.defaultdict(list)
  for row in map(source.text, range(len(source))):
    if row["kind"] == "describe":
      continue
    right, wrong = (
      row[name].partition(" </think> ")[0] for name in ("chosen", "rejected")
    )
    assert right != wrong
    change = collections.Counter(wrong.split())
    change.subtract(right.split())
    for word, count in change.items():
      if count:
        changes[row["kind"], word].append(count)
  assert len(changes) > 60
  for which, counts in changes.items():
    error = np.sqrt(np.sum(np.square(counts)))
    # 4.5 errors: about once in 1,000 for all of these.
    assert abs(sum(counts)) <= 4.5 * error, which


@pytest.mark.parametrize(("count", "new"), [(10_000, 0.0), (6_000, 1.0)])
def test_words_alone_do_not_tell_chosen_from_rejected(count, new):
  """A classifier of words, and of question and answer words together."""
  train, test = (_pairs(split, count, new) for split in ("train", "val"))
  guess = _fitted(train)
  right = guess(test)
  sys.stdout.write(f"bag of words: {right.mean():.4f}\n")
  kinds = np.repeat([kind for kind, *_ in test], 2)
  for kind in sorted(set(kinds)):
    sys.stdout.write(f"  {kind}: {right[kinds == kind].mean():.3f}\n")
    # Four standard errors of a fair coin over the kind's pairs.
    slack = 4 * 0.5 / np.sqrt((kinds == kind).sum() / 2)
    assert right[kinds == kind].mean() <= 0.5 + slack, kind
  assert right.mean() <= 0.53


def test_the_classifier_of_words_finds_a_planted_habit():
  """The control of the test above: one in eight wrong answers is odd."""
  train, test = (
    [
      (kind, q, a, "purple" if i % 8 == 0 else b)
      for i, (kind, q, a, b) in enumerate(_pairs(split, 2000))
    ]
    for split in ("train", "val")
  )
  assert _fitted(train)(test).mean() > 0.53


def _pairs(split, count, new=0.0):
  source = scenes.Scenes(
    task="preference", split=split, size=count, new_fraction=new
  )
  rows = (source.text(i) for i in range(count))
  return [
    (row["kind"], row["question"], row["chosen"], row["rejected"])
    for row in rows
  ]


def _fitted(pairs):
  """Fit on pairs; return a function that marks both answers of each pair."""
  vectors = feature_extraction.text.CountVectorizer(analyzer=_features)
  known = vectors.fit_transform(_answers(pairs))
  model = linear_model.LogisticRegression(C=0.1, max_iter=300, tol=1e-3)
  model.fit(known, _truth(pairs))

  def marks(others):
    found = model.predict(vectors.transform(_answers(others)))
    return found == _truth(others)

  return marks


def _answers(pairs):
  return [(k, q, answer) for k, q, *both in pairs for answer in both]


def _truth(pairs):
  return np.tile([1, 0], len(pairs))


def _features(said):
  kind, question, answer = said
  asked, words = question.split(), answer.split()
  yield from asked
  for word in words:
    yield f"-> {word}"
    yield f"{kind} -> {word}"
  for first, second in zip(words, words[1:]):
    yield f"-> {first} {second}"
  yield f"{question} -> {answer if len(words) < 4 else ''}"


def test_notes_hold_the_words_of_the_caption_thing_by_thing_in_any_order():
  orders = set()
  for i in range(200):
    description = scenes._description(0, "notes", i)
    said = questions.notes(description, np.random.default_rng(i))
    assert said.startswith(": ") and said.endswith(" ,")
    listed = questions.caption(description).split(" : ")[1].split(" , ")
    wanted = [sorted(part.replace(" at ", " ").split()) for part in listed]
    found = [sorted(part.split()) for part in said[2:-2].split(" , ")]
    assert sorted(found) == sorted(wanted)
    orders.add(found == wanted)
  assert orders == {True, False}


def test_a_chart_stays_in_its_order_in_notes():
  description = next(
    one
    for one in (scenes._description(0, "notes", i) for i in range(50))
    if one.chart
  )
  bars = " ".join(" ".join(bar) for bar in description.chart.bars)
  for seed in range(20):
    said = questions.notes(description, np.random.default_rng(seed))
    assert f"chart {bars}" in said
