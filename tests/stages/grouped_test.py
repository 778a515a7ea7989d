"""Rows of 1 to 4 pairs on one image train as the same pairs one by one."""

import json

import numpy as np
import pytest
from PIL import Image

from pivot_jax import metrics
from pivot_jax.stages import score, train
from tests.fixtures import tiny_stages

COUNTS = (1, 4, 2, 3)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """Return the config entry of ten pairs on four images and questions."""
  folder = tmp_path_factory.mktemp("rows")
  rng = np.random.default_rng(0)
  records = []
  for group, count in enumerate(COUNTS):
    image = rng.integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(image).save(folder / f"{group}.png")
    records += [
      dict(
        id=f"{group}-{k}",
        image=f"{group}.png",
        question=f"what is number {group} ?",
        chosen=f"one , two and {k}",
        rejected="no" * (k + 1),
      )
      for k in range(count)
    ]
  path = folder / "pairs.jsonl"
  path.write_text("".join(json.dumps(one) + "\n" for one in records))
  return dict(kind="preference", path=str(path))


def trained(rows, init, folder, **fields):
  """Return the metrics of one update on all pairs."""
  inputs = {"init": init}
  if fields["objective"] == "dpo":
    # Scored one by one: columns belong to pairs.
    plain = dict(rows, group=False)
    how = tiny_stages.config("score", plain, mask="answer")
    score.run(how, inputs, folder / "reference")
    inputs["reference"] = str(folder / "reference")
  config = tiny_stages.config(
    "train", rows, steps=1, warmup=0.0, sft_group=0, **fields
  )
  out = folder / "out"
  out.mkdir(parents=True)
  train.run(config, inputs, out)
  (line,) = metrics.read(out)
  return line


@pytest.mark.nightly
@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_a_grouped_update_is_that_of_its_pairs(rows, init, tmp_path, objective):
  fields = dict(objective=objective, mask="answer")
  alone = trained(rows, init, tmp_path / "alone", batch=10, **fields)
  group = dict(rows, group=True)
  joined = trained(group, init, tmp_path / "joined", batch=4, **fields)
  assert joined.keys() == alone.keys() and "losses/total" in joined
  # Policy and reference are one: whether a margin of zero is over zero is chance.
  joined.pop("rewards/accuracies", None)
  for name, value in alone.items():
    if name == "rewards/accuracies":
      continue
    assert joined[name] == pytest.approx(value, rel=5e-5, abs=1e-6), name
