"""The report of a synthetic run: what is claimed, refused, shown and escaped."""

import json
import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from pivot_jax import errors
from pivot_jax.configs import pivot
from pivot_jax.data.scenes import scenes
from pivot_jax.report import compare, markup
from pivot_jax.stages import report

CATEGORIES = ("General", "Vision-Centric")
# Of 20 questions, the number that each arm answers rightly.
RIGHT = dict(original=8, stage1=8, sft=9, dpo=17)
CAUTION = "This is a test."
_MEASURING = {
  "linear_probe": "linear",
  "segment_probe": "segment",
  "gradcam": "gradient",
  "evaluate_pivot": "vqa",
  "evaluate": "mllm",
}
# What a plan gives a report, and what the recipe adds.
DESIGN = dict(
  arms=[dict(arm) for arm in pivot.ARMS],
  compared=[dict(pair) for pair in pivot.COMPARED],
  measuring={
    f"{stage}_{arm}": (arm, measure)
    for stage, measure in _MEASURING.items()
    for arm in RIGHT
  },
  caution=CAUTION,
)
NASTY = "what is <script>alert(1)</script> & co?"


def share(hits, n):
  rate = hits / n
  return dict(value=rate, n=n, se=math.sqrt(rate * (1 - rate) / n))


class Run:
  """Writes the folders that stages leave, and remembers them as inputs."""

  def __init__(self, root):
    self.root, self.inputs = root, {}

  def stage(self, name, kind, metrics, **fields):
    folder = self.root / name
    folder.mkdir(parents=True)
    done = dict(stage=name, kind=kind, fields=fields, metrics=metrics)
    done |= dict(seconds=1.5, versions=dict(jax="0.1"))
    (folder / "done.json").write_text(json.dumps(done))
    self.inputs[name] = str(folder)
    return folder

  def report(self, **config):
    out = self.root / "report"
    section = ConfigDict(dict(title="A run", left_out={}) | DESIGN | config)
    report.run(section, self.inputs, out)
    return json.loads((out / "report.json").read_text())

  def html(self):
    return (self.root / "report.html").read_text("utf-8")

  def train(self, name, **metrics):
    given = dict(rows="aa", init="bb", loss=1.0, steps=300, examples=9)
    given |= {"change/vision": 0.02, "change/llm": 0.01}
    folder = self.stage(name, "train", given | metrics)
    lines = [
      {
        "step": step,
        "losses/total": 3 / step**0.5,
        "rewards/margins": step / 100,
        "rewards/chosen": step / 300,
        "rewards/rejected": -step / 200,
        "rewards/accuracies": 1 - 0.5 / step,
      }
      for step in range(1, 301)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)

  def evaluate(self, name, right):
    records = [
      dict(
        id=f"q{i}",
        category=CATEGORIES[i % 2],
        kind="colour",
        question=NASTY,
        answer="red",
        said="red",
        correct=i < right,
      )
      for i in range(20)
    ]
    groups = {
      c: sum(r["correct"] for r in records if r["category"] == c)
      for c in CATEGORIES
    }
    found = {f"category/{c}": share(hits, 10) for c, hits in groups.items()}
    found |= {f"majority/{c}": share(3, 10) for c in CATEGORIES}
    found |= {"kind/colour": share(right, 20), "all": share(right, 20)}
    folder = self.stage(name, "evaluate", found)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "predictions.jsonl").write_text(text)

  def linear(self, arm, right):
    hits = np.arange(40) < right
    name = f"linear_probe_{arm}"
    parts = ("encoder", "projector")
    found = {f"{p}/top1": share(right, 40) for p in parts}
    folder = self.stage(name, "linear_probe", found)
    arrays = {f"{p}_correct": hits for p in parts}
    arrays |= {f"{p}_prototype_correct": hits for p in parts}
    np.savez(folder / "predictions.npz", label=np.arange(40) % 4, **arrays)

  def segment(self, arm, seed):
    rng = np.random.default_rng(seed)
    rows = [
      scenes.Scenes(task="segment", split="probe_test", size=6)[i]
      for i in range(6)
    ]
    truth = np.stack([row["labels"] for row in rows])
    said = np.where(rng.random(truth.shape) < 0.9, truth, 0)
    value = dict(value=0.5, n=6, se=0.05)
    folder = self.stage(
      f"segment_probe_{arm}",
      "segment_probe",
      dict(macro_recall=value, miou=value, best_epoch=2),
      sources=dict(a=dict(kind="scenes")),
    )
    images = np.stack([row["image"] for row in rows])
    np.savez(folder / "maps.npz", images=images, labels=truth, predicted=said)
    hits = rng.integers(1, 9, (6, 3))
    rest = dict(right=hits.sum(1), decisions=np.full(6, 30))
    for field in ("misses", "false_alarms", "predicted", "true"):
      rest[field] = hits + 2
    np.savez(
      folder / "counts.npz",
      id=np.array([f"i{i}" for i in range(6)]),
      hits=hits,
      shared=hits,
      **rest,
    )

  def gradcam(self, arm, values):
    source = scenes.Scenes(task="preference", split="gradcam", size=6)
    rows = [source[i] for i in range(6)]
    keys = [
      f"{tap}/{loss}"
      for tap in ("encoder", "projector")
      for loss in ("sft", "dpo_chosen", "dpo_total")
    ]
    one = dict(value=float(np.nanmean(values)), n=len(values), se=0.1)
    found = {key: one for key in keys} | dict(scenes=6, without_object=0)
    folder = self.stage(f"gradcam_{arm}", "gradcam", found)
    ids = np.array([row["id"] for row in rows])
    np.savez(
      folder / "values.npz",
      id=ids,
      kind=ids,
      mask_share=np.ones(6),
      **{key: np.array(values) for key in keys},
    )
    maps = np.random.default_rng(0).random((6, 6, 6)) ** 3
    np.savez(
      folder / "maps.npz",
      images=np.stack([row["image"] for row in rows]),
      masks=np.stack([row["object_mask"] for row in rows]),
      **{f"picture/{key}": maps for key in keys},
    )
    texts = [
      {k: row[k] for k in ("id", "chosen", "rejected", "category", "kind")}
      | {"question": NASTY}
      for row in rows
    ]
    (folder / "examples.json").write_text(json.dumps(texts))


def whole(root):
  run = Run(root)
  for name in ("stage1_proj", "stage1_full", "stage2_sft", "stage2_dpo"):
    run.train(name)
  for index, (arm, right) in enumerate(RIGHT.items()):
    run.linear(arm, 2 * right)
    run.segment(arm, index)
    run.gradcam(arm, [1.0, 2.0, 1.5, 1.0 + index, 2.0, 1.2])
    if arm != "original":
      run.evaluate(f"evaluate_{arm}", right)
    run.evaluate(f"evaluate_pivot_{arm}", right)
  return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  made = whole(tmp_path_factory.mktemp("run"))
  made.record = made.report()
  return made


def test_no_difference_is_claimed_within_two_paired_errors():
  # One of ten items differs: mean 0.1, SE sqrt(0.1)/sqrt(10) = 0.1.
  one, other = np.zeros(10), np.zeros(10)
  one[0] = 1
  found = compare.paired(one, other)
  assert found["value"] == pytest.approx(0.1)
  assert found["se"] == pytest.approx(0.1)
  assert not compare.is_shown(found)
  # Six of ten: mean 0.6, SE sqrt(0.24 * 10 / 9 / 10) = 0.1633.
  one[:6] = 1
  found = compare.paired(one, other)
  assert found["se"] == pytest.approx(0.16330, abs=1e-5)
  assert compare.is_shown(found)


def test_the_report_says_which_differences_are_shown(run):
  found = run.record["results"]["differences"]
  # 8 of 20 questions, 4 of 10 in each category: SE sqrt(.24 * 10/9 / 10).
  vqa = found["dpo-sft"]["vqa/all"]
  assert vqa["value"] == pytest.approx(0.4) and vqa["shown"]
  each = math.sqrt(0.24 * 10 / 9 / 10)
  assert vqa["se"] == pytest.approx(each / math.sqrt(2))
  assert not found["sft-stage1"]["vqa/all"]["shown"]
  page = run.html()
  assert "DPO is higher than SFT in VQA" in page
  assert "no difference shown" in page
  assert CAUTION in page


def test_text_of_the_data_is_escaped(run):
  page = run.html()
  assert "&lt;script&gt;alert(1)" in page and "<script" not in page
  assert markup.POLICY in page and "http://" not in page


def test_the_root_and_the_stage_hold_the_same_report(run):
  for name in ("report.json", "report.html"):
    root = (run.root / name).read_bytes()
    assert root == (run.root / "report" / name).read_bytes()
  assert not list(run.root.glob("*.tmp"))


def test_results_are_the_same_again_and_hold_no_times(run):
  text = json.dumps(run.record["results"], sort_keys=True)
  assert "seconds" not in text
  assert text == json.dumps(run.report()["results"], sort_keys=True)


@pytest.mark.parametrize("field", ["rows", "init"])
def test_arms_of_other_rows_or_weights_are_refused(tmp_path, field):
  run = Run(tmp_path)
  run.train("stage2_sft")
  run.train("stage2_dpo", **{field: "other"})
  with pytest.raises(errors.InputError, match=f"{field} is other"):
    run.report()


def test_absent_stages_leave_their_columns_out(tmp_path):
  run = Run(tmp_path)
  for arm in ("sft", "dpo"):
    run.linear(arm, 20)
  record = run.report(left_out={"evaluate_pivot_dpo": "no data: set x<y"})
  assert set(record["results"]["arms"]) == {"sft", "dpo"}
  page = run.html()
  assert "Linear probe" in page and "no data: set x&lt;y" in page
  for absent in ("VQA, %", "mIoU", "Gradient on", "<svg", "<img"):
    assert absent not in page


def test_a_run_of_nothing_still_gives_a_report(tmp_path):
  run = Run(tmp_path)
  assert run.report()["results"]["arms"] == {}
  assert "nothing is compared" in run.html()


def test_seeds_are_averaged_with_the_error_across_them(tmp_path):
  run = Run(tmp_path)
  for prefix, right in (("", 8), ("seed1/", 12), ("seed2/", 16)):
    run.evaluate(f"{prefix}evaluate_pivot_sft", 8)
    run.evaluate(f"{prefix}evaluate_pivot_dpo", right)
  record = run.report()
  # Shares .4, .6, .8: mean .6, deviation .2, error .2 / sqrt(3), widened by
  # Student's t of two degrees of freedom, 4.303 where a normal has 2.
  dpo = record["results"]["arms"]["dpo"]["vqa/all"]
  assert record["seeds"] == 3
  assert dpo["value"] == pytest.approx(0.6)
  assert dpo["se"] == pytest.approx(0.2 / math.sqrt(3) * 4.30265 / 2, rel=1e-5)
  difference = record["results"]["differences"]["dpo-sft"]["vqa/all"]
  assert difference["value"] == pytest.approx(0.2)
  assert not difference["shown"]


def test_arms_measured_on_other_items_are_refused(tmp_path):
  run = Run(tmp_path)
  for arm in ("sft", "dpo"):
    run.linear(arm, 20)
  path = tmp_path / "linear_probe_dpo" / "predictions.npz"
  np.savez(path, label=np.zeros(40), encoder_correct=np.ones(40))
  with pytest.raises(errors.InputError, match="different items"):
    run.report()


def test_gradients_are_paired_over_scenes_that_both_have(tmp_path):
  run = Run(tmp_path)
  run.gradcam("sft", [1.0, 1.0, 1.0, 1.0, 1.0, np.nan])
  run.gradcam("dpo", [2.0, 2.0, 2.0, 2.0, 7.0, 9.0])
  found = run.report()["results"]["differences"]["dpo-sft"][
    "gradient/encoder/sft"
  ]
  # Differences 1, 1, 1, 1, 6: mean 2, deviation sqrt(5), error 1.
  assert found["n"] == 5
  assert found["value"] == pytest.approx(2) and found["se"] == pytest.approx(1)


def test_answers_are_grouped_however_their_letters_are_composed(tmp_path):
  rows = [
    dict(id=str(i), category=name, kind="k", correct=i == 0)
    for i, name in enumerate(("\u00f6l", "o\u0308l"))
  ]
  stages = {}
  for arm in ("dpo", "sft"):
    folder = tmp_path / arm
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text(text)
    done = dict(folder=folder, kind="evaluate")
    stages[f"evaluate_pivot_{arm}"] = done
  design = compare.Design.of(DESIGN)
  found = compare.differences(stages, design, ["vqa"])["dpo-sft"]
  assert set(found) == {"vqa/category/\u00f6l", "vqa/kind/k", "vqa/all"}
  assert found["vqa/category/\u00f6l"]["n"] == 2


def test_arms_and_pairs_are_those_of_the_config(tmp_path):
  """Another arm, another headline: no name is the package's."""
  run = Run(tmp_path)
  run.linear("grpo", 20)
  run.linear("original", 30)
  arms = [
    dict(name="original", model="m", label="as it came", short="start"),
    dict(name="grpo", model="hf:DIR", label="GRPO <b>", short="GRPO"),
  ]
  record = run.report(
    arms=arms,
    compared=[dict(one="grpo", other="original", same_rows=False)],
    measuring={
      f"linear_probe_{name}": (name, "linear") for name in ("grpo", "original")
    },
  )
  found = record["results"]
  assert set(found["arms"]) == {"original", "grpo"}
  assert set(found["differences"]) == {"grpo-original"}
  page = run.html()
  assert "GRPO is lower than start in" in page and "GRPO − start" in page
  assert "as it came" in page and "GRPO &lt;b&gt;" in page


def test_numbers_of_an_unknown_kind_are_in_a_plain_table(tmp_path):
  run = Run(tmp_path)
  number = dict(value=0.12345, n=7, se=0.01)
  run.stage("mine", "mine/x.py:run", {"share <i>": number, "count": 3})
  assert run.report()["results"]["other"]["mine"]["count"] == 3
  page = run.html()
  assert "Other measurements" in page and "0.1235" in page
  assert "share &lt;i&gt;" in page
