"""Answers against greedy decoding without a cache, and how they are counted."""

import dataclasses
import json
import unicodedata

import jax
import numpy as np
import pytest
from PIL import Image

from pivot_jax.data.scenes import scenes
from pivot_jax.errors import InputError
from pivot_jax.models import mllm
from pivot_jax.stages import evaluate
from pivot_jax.weights import checkpoint
from tests.fixtures import tiny_models, tiny_stages

SIZE, STEPS = 11, 5
ROWS = tiny_stages.source("eval", SIZE, split="test")
# A tied head repeats the last token for ever.
LLM = dataclasses.replace(tiny_stages.LLM, tie_word_embeddings=False)
MODEL = mllm.MLLM(llm=LLM, vision=tiny_stages.VISION)
FIELDS = ("id", "category", "kind", "question", "answer")


@pytest.fixture(scope="module")
def source():
  return scenes.Scenes(task="eval", split="test", size=SIZE)


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
  """Return the address of a model whose answers end, early or late."""
  params = jax.tree.map(np.copy, tiny_stages.params(MODEL, scale=12.0))
  # A long column of the head wins where it points the right way.
  params["llm"]["lm_head"]["kernel"][:, tiny_stages.TOKENIZER.im_end] *= 6
  return tiny_stages.save(tmp_path_factory.mktemp("talkative"), params, MODEL)


def config(**fields):
  fields = dict(batch=8, max_new_tokens=STEPS) | fields
  return tiny_stages.config("evaluate", ROWS, **fields)


@pytest.fixture(scope="module")
def finished(talkative, tmp_path_factory):
  """Return (what the stage reports, its predictions)."""
  out = tmp_path_factory.mktemp("evaluate")
  found = evaluate.run(config(), {"init": talkative}, out)
  lines = (out / "predictions.jsonl").read_text("utf-8").splitlines()
  return found, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def greedy(talkative, source):
  """Return the tokens of each answer, every one from a whole forward pass."""
  params = checkpoint.load(talkative).params
  found, pictures = [], []
  for index in range(SIZE):
    row = source[index]
    asked = f"<|im_start|>user\n<image>\n{row['question']}<|im_end|>\n"
    found.append(
      tiny_stages.ids(f"{tiny_stages.SYSTEM}{asked}<|im_start|>assistant\n")
    )
    pictures.append(tiny_stages.pixels(row["image"]))
  width = max(len(tokens) for tokens, _ in found) + STEPS
  batch = tiny_stages.sequences(found, np.stack(pictures), width=width)
  return tiny_models.uncached(MODEL, params, batch, STEPS)


def ends(row):
  return np.flatnonzero(np.isin(row, tiny_stages.TOKENIZER.eos_ids))


def test_answers_are_greedy_up_to_the_first_stop_token(finished, greedy):
  _, records = finished
  stops = [ends(row) for row in greedy]
  # Some answers end at once, some later, and some are cut.
  assert {0, STEPS} < {int(s[0]) if len(s) else STEPS for s in stops}
  wanted = [
    tiny_stages.TOKENIZER.decode(row[: s[0]] if len(s) else row)
    for row, s in zip(greedy, stops)
  ]
  assert len(set(wanted)) > SIZE // 2
  assert [record["said"] for record in records] == wanted


def test_a_last_batch_that_is_not_full_gives_one_answer_a_row_in_order(
  finished, source
):
  _, records = finished
  assert len(records) == SIZE and SIZE % 8
  for index, record in enumerate(records):
    row = source.text(index)
    assert {f: record[f] for f in FIELDS} == {f: row[f] for f in FIELDS}
    assert record["correct"] is False


def test_the_report_is_the_summary_of_the_predictions(finished):
  found, records = finished
  assert found == evaluate.summarize(records)
  assert found["all"]["n"] == SIZE


def test_an_answer_counts_in_another_form_and_not_as_another_word(
  finished, source, talkative, tmp_path
):
  _, records = finished
  rows, wanted = [], []
  for index, record in enumerate(records):
    said = record["said"].strip()
    Image.fromarray(source[index]["image"]).save(tmp_path / f"{index}.png")
    # Every other reference is what the model says, in another form.
    same = index % 2 == 0 and said != ""
    answer = f" {said.upper()}." if same else "no"
    row = dict(id=str(index), image=f"{index}.png", answer=answer)
    rows.append(json.dumps(row | {"question": record["question"]}))
    wanted.append(same)
  (tmp_path / "suite.jsonl").write_text("\n".join(rows))
  suite = dict(kind="eval", path=str(tmp_path / "suite.jsonl"))
  stage = tiny_stages.config("evaluate", suite, batch=8, max_new_tokens=STEPS)
  found = evaluate.run(stage, {"init": talkative}, tmp_path / "out")
  text = (tmp_path / "out" / "predictions.jsonl").read_text("utf-8")
  again = [json.loads(line) for line in text.splitlines()]
  assert [r["said"] for r in again] == [r["said"] for r in records]
  assert [r["correct"] for r in again] == wanted and 2 < sum(wanted) < 8
  assert found["category/suite"]["value"] == sum(wanted) / SIZE


def test_an_answer_that_cannot_be_said_is_refused(talkative, tmp_path, source):
  Image.fromarray(source[0]["image"]).save(tmp_path / "0.png")
  row = dict(id="a", image="0.png", question="what ?", answer="no " * STEPS)
  (tmp_path / "suite.jsonl").write_text(json.dumps(row))
  suite = dict(kind="eval", path=str(tmp_path / "suite.jsonl"))
  stage = tiny_stages.config("evaluate", suite, max_new_tokens=STEPS - 1)
  with pytest.raises(InputError, match="suite.jsonl:1: .*max_new_tokens=4"):
    evaluate.run(stage, {"init": talkative}, tmp_path / "out")


def test_a_prompt_over_max_length_is_refused_with_its_length(
  talkative, tmp_path, source
):
  lengths = [
    len(tiny_stages.TOKENIZER.encode(source.text(i)["question"]))
    for i in range(SIZE)
  ]
  frame = f"{tiny_stages.SYSTEM}<|im_start|>user\n<image>\n<|im_end|>\n"
  around = len(tiny_stages.ids(f"{frame}<|im_start|>assistant\n")[0])
  longest = around + max(lengths)
  with pytest.raises(
    InputError,
    match=f"longest prompt has {longest} tokens .*max_length={longest - 1}: ",
  ):
    evaluate.run(
      config(max_length=longest - 1), {"init": talkative}, tmp_path / "out"
    )
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("said, form", [
  ("Yes", "yes"),
  (" top\n  left ", "top left"),
  ("TRUE.", "true"),
  ("two .", "two"),
  ("a.b", "a.b"),
  ("no..", "no."),
  (".", ""),
  ("", ""),
])  # fmt: skip
def test_answers_are_compared_in_one_form(said, form):
  assert evaluate.normalize(said) == form


def record(category, kind, answer, correct):
  return dict(category=category, kind=kind, answer=answer, correct=correct)


def test_shares_and_errors_are_those_counted_by_hand():
  found = evaluate.summarize(
    [
      record("ocr", "digit", "3", True),
      record("ocr", "digit", "3", True),
      record("ocr", "letter", "e", True),
      record("ocr", "letter", "E.", False),
      record("vision", "count", "two", False),
      record("vision", "where", "top left", False),
    ]
  )
  assert set(found) == {
    "all",
    *(f"category/{name}" for name in ("ocr", "vision")),
    *(f"kind/{name}" for name in ("digit", "letter", "count", "where")),
    *(f"majority/{name}" for name in ("ocr", "vision")),
  }
  # SE of a share p of n is sqrt(p (1 - p) / n).
  ocr = 3**0.5 / 8
  assert found["category/ocr"] == {
    "value": 0.75, "n": 4, "se": pytest.approx(ocr)
  }  # fmt: skip
  assert found["category/vision"] == {"value": 0.0, "n": 2, "se": 0.0}
  assert found["kind/letter"] == {
    "value": 0.5, "n": 2, "se": pytest.approx(8**-0.5)
  }  # fmt: skip
  # The mean of two categories, however many questions each has.
  assert found["all"] == {
    "value": 0.375, "n": 6, "se": pytest.approx(ocr / 2)
  }  # fmt: skip
  # "3" twice of four; "e" and "E." are one answer, twice of four as well.
  assert found["majority/ocr"]["value"] == 0.5
  assert found["majority/vision"]["value"] == 0.5


def test_answers_of_one_form_are_one_majority():
  found = evaluate.summarize(
    [record("a", "b", said, True) for said in ("Yes", "yes.", " YES", "no")]
  )
  assert found["majority/a"]["value"] == 0.75


# "Zoë" and "Đặng" in one code point a letter, and with marks of their own.
@pytest.mark.parametrize("name", ["Zo\u00eb", "\u0110\u1eb7ng", "\u0130z"])
def test_answers_are_one_however_their_letters_are_composed(name):
  parts = unicodedata.normalize("NFD", name)
  assert parts != name or name == "\u0130z"
  assert evaluate.normalize(parts) == evaluate.normalize(name)


def test_groups_are_one_however_their_letters_are_composed():
  composed, parts = "caf\u00e9", "cafe\u0301"
  found = evaluate.summarize(
    [
      record(composed, parts, composed, True),
      record(parts, composed, parts, False),
      record(composed, composed, "tea", False),
    ]
  )
  assert set(found) == {
    "all", *(f"{by}/{composed}" for by in ("category", "kind", "majority"))
  }  # fmt: skip
  assert found[f"category/{composed}"]["n"] == 3
  assert found[f"majority/{composed}"]["value"] == pytest.approx(2 / 3)
