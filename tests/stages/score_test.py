"""Reference log-probabilities against each answer alone, and their order."""

import json

import jax
import numpy as np
import pytest

from pivot_jax import trees
from pivot_jax.data.scenes import scenes
from pivot_jax.errors import InputError
from pivot_jax.stages import score
from pivot_jax.weights import checkpoint
from tests.fixtures import tiny_models, tiny_stages

SIZE = 11
ROWS = tiny_stages.source("preference", SIZE)
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def source():
  return scenes.Scenes(task="preference", split="train", size=SIZE)


def scored(init, out, **fields):
  """Return (what the stage reports, its columns, its fingerprint)."""
  found = score.run(
    tiny_stages.config("score", ROWS, **fields), {"init": init}, out
  )
  made = json.loads((out / "reference.json").read_text())
  with np.load(out / "reference.npz", allow_pickle=False) as file:
    return found, dict(file), made


@pytest.fixture(scope="module")
def columns(init, tmp_path_factory):
  """Return the columns by batch size: all rows at once, and four at a time."""
  return {
    batch: scored(init, tmp_path_factory.mktemp("score"), batch=batch)
    for batch in (16, 4)
  }


def alone(source):
  """Return (tokens, image start, answer start) of each answer, and images."""
  found, pictures = [], []
  for index in range(SIZE):
    row = source[index]
    asked = f"{tiny_stages.SYSTEM}<|im_start|>user\n<image>\n{row['question']}"
    prompt, start = tiny_stages.ids(f"{asked}<|im_end|>\n")
    for side in SIDES:
      said = f"<|im_start|>assistant\n{row[side]}<|im_end|>\n"
      found.append((prompt + tiny_stages.ids(said)[0], start, len(prompt)))
      pictures.append(tiny_stages.pixels(row["image"]))
  return found, np.stack(pictures)


@pytest.fixture(scope="module")
def plain(init, source):
  """Return [rows, 2]: one causal sequence an answer, softmax in float64."""
  params = checkpoint.load(init).params
  found, pictures = alone(source)
  batch = tiny_stages.sequences([f[:2] for f in found], pictures, width=128)
  hidden = np.float64(tiny_models.hidden(tiny_stages.MODEL, params, batch))
  head = np.float64(params["llm"]["embed_tokens"]["embedding"]).T
  sums = []
  for states, (tokens, _, begin) in zip(hidden, found):
    # Every token of the answer's turn is a target, its <|im_start|> included,
    # which the last token of the prompt predicts.
    logits = states[begin - 1 : len(tokens) - 1] @ head
    top = logits.max(-1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    right = logits[np.arange(len(logits)), tokens[begin:]]
    sums.append((right - total).sum())
  return np.reshape(sums, (SIZE, 2))


def test_each_sum_is_that_of_the_answer_alone_behind_its_prompt(
  columns, plain, source
):
  lengths = {len(source.text(i)[side]) for i in range(SIZE) for side in SIDES}
  assert len(lengths) > 8
  assert np.ptp(plain) > 50 and np.abs(plain[:, 0] - plain[:, 1]).min() > 1e-3
  for _, found, _ in columns.values():
    assert found["logps"].dtype == np.float32
    np.testing.assert_allclose(found["logps"], plain, rtol=2e-6, atol=1e-5)


def test_the_batch_size_changes_nothing(columns):
  (_, one, _), (_, four, _) = columns[16], columns[4]
  np.testing.assert_allclose(one["logps"], four["logps"], rtol=1e-6, atol=1e-5)
  for name in ("id", "crc"):
    np.testing.assert_array_equal(one[name], four[name])


def test_rows_are_in_the_order_of_the_source_each_with_the_code_of_its_text(
  columns, source
):
  _, found, _ = columns[4]
  assert found["id"].tolist() == [source.name(i) for i in range(SIZE)]
  texts = [
    tuple(source.text(i)[field] for field in ("question", *SIDES))
    for i in range(SIZE)
  ]
  codes = found["crc"].tolist()
  assert len(set(texts)) == len(set(codes)) == len(set(zip(texts, codes))) > 8


def test_the_stage_reports_rows_and_means(columns):
  reported, found, _ = columns[16]
  means = found["logps"].mean(0)
  assert reported == {
    "rows": SIZE,
    "logps/chosen": pytest.approx(means[0]),
    "logps/rejected": pytest.approx(means[1]),
  }


def test_the_fingerprint_is_of_weights_and_of_what_made_the_rows(
  init, columns, reference
):
  params = checkpoint.load(init).params
  _, found, made = columns[16]
  assert made == {
    "weights": trees.digest(trees.fingerprint(params)),
    "tokenizer": tiny_stages.TOKENIZER.fingerprint,
    "template": "qwen_1_5",
    "mask": "paper",
    "resample": "bicubic",
    "rows": trees.digest(found["crc"].tolist()),
  }
  more = json.loads((reference / "reference.json").read_text())
  assert more["rows"] != made["rows"]
  assert more | {"rows": made["rows"]} == made


def test_one_changed_weight_changes_the_fingerprint(init, columns, tmp_path):
  params = jax.tree.map(np.copy, checkpoint.load(init).params)
  params["llm"]["norm"]["scale"][3] += 1e-3
  address = tiny_stages.save(tmp_path / "other", params)
  _, _, made = scored(address, tmp_path / "out", batch=16)
  _, _, before = columns[16]
  assert made["weights"] != before["weights"]
  assert made | {"weights": before["weights"]} == before


def test_a_pair_over_max_length_is_named(init, tmp_path):
  with pytest.raises(
    InputError, match=r"scenes/preference/train/0/\d+: .* over max_length=50"
  ):
    scored(init, tmp_path, max_length=50)
