"""Compares the arms: their numbers side by side, and paired differences.

Reads what the measuring stages left (done.json's metrics, predictions item by
item) and returns means, differences and standard errors. Differences are
paired: both arms answered the same items, so the error is that of the items'
differences. It measures no model and draws nothing. Legend: N items.
"""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special

from pivot_jax import files, metrics, texts
from pivot_jax.errors import InputError
from pivot_jax.evals import segmentation

ARMS = ("original", "stage1", "sft", "dpo")
PAIRS = (
  ("dpo", "sft"),
  ("dpo", "original"),
  ("dpo", "stage1"),
  ("sft", "stage1"),
)
# The stage that measures an arm, by the first part of a measure's name.
MEASURED_BY = {
  "vqa": "evaluate_pivot",
  "linear": "linear_probe",
  "segment": "segment_probe",
  "gradient": "gradcam",
}
HEADLINES = {
  "vqa/all": "VQA of the re-assembled model",
  "linear/encoder/top1": "the linear probe of the encoder",
  "linear/projector/top1": "the linear probe of the projector",
  "segment/macro_recall": "segmentation macro recall",
  "segment/miou": "segmentation mIoU",
  "gradient/encoder/sft": "gradient localisation at the encoder (SFT loss)",
  "gradient/encoder/dpo_total": "gradient localisation at the encoder (DPO loss)",
  "gradient/projector/sft": "gradient localisation at the projector (SFT loss)",
  "gradient/projector/dpo_total": (
    "gradient localisation at the projector (DPO loss)"
  ),
}
CAUTION = (
  "This is an experiment at toy scale: it demonstrates the pipeline and can "
  "neither confirm nor refute the paper."
)
RESAMPLES = 500
Measures = dict[str, metrics.Measured]
# Per stage its done.json and, under "folder", where it is.
Stages = Mapping[str, Mapping[str, Any]]


def by_seed(inputs: Mapping[str, str]) -> dict[int, dict[str, dict[str, Any]]]:
  """Return per seed the stages' records, by names without their seed."""
  found: dict[int, dict[str, dict[str, Any]]] = {}
  for name, address in inputs.items():
    match = re.fullmatch(r"(?:seed(\d+)/)?(.+)", name)
    folder = pathlib.Path(address)
    done = files.read_json(folder / "done.json")
    done |= {"stage": name, "folder": folder}
    found.setdefault(int(match[1] or 0), {})[match[2]] = done
  return dict(sorted(found.items()))


def compare_stage2(
  seeds: Mapping[int, Stages],
) -> dict[str, dict[str, str]]:
  """Return rows and start of the two arms; raise if they are not the same."""
  found = {}
  for seed, stages in seeds.items():
    if "stage2_sft" not in stages or "stage2_dpo" not in stages:
      continue
    sft, dpo = (stages[f"stage2_{arm}"] for arm in ("sft", "dpo"))
    for field in ("rows", "init"):
      if sft["metrics"][field] != dpo["metrics"][field]:
        raise InputError(
          f"{dpo['folder']}/done.json: {field} is {dpo['metrics'][field]}, in "
          f"{sft['folder']} {sft['metrics'][field]}: SFT and DPO are only "
          "comparable on the same rows from the same weights; give both the "
          "same data, data_seed, batch, steps and init"
        )
    found[f"seed{seed}"] = {f: sft["metrics"][f] for f in ("rows", "init")}
  return found


def results(seeds: Mapping[int, Stages]) -> dict[str, Any]:
  """Return every number of the report, without times."""
  first = next(iter(seeds.values()), {})
  return {
    "arms": over_seeds([arms(x, MEASURED_BY) for x in seeds.values()]),
    "differences": judged(
      over_seeds([differences(x, MEASURED_BY) for x in seeds.values()])
    ),
    "majority": _majority(first),
    "blind": _blind(first),
    "mllms": over_seeds(
      [arms(x, {"mllm": "evaluate"}) for x in seeds.values()]
    ),
    "mllm_differences": judged(
      over_seeds([differences(x, {"mllm": "evaluate"}) for x in seeds.values()])
    ),
    "change": over_seeds([_changes(x) for x in seeds.values()]),
    "lambda": {
      done["stage"]: _lambdas(done["metrics"])
      for stages in seeds.values()
      for done in stages.values()
      if done["kind"] == "linear_probe"
    },
    "training": {
      done["stage"]: {
        key: value
        for key, value in done["metrics"].items()
        if isinstance(value, int | float | str)
      }
      for stages in seeds.values()
      for done in stages.values()
      if done["kind"] == "train"
    },
  }


def verdict(found: Mapping[str, Any]) -> str:
  """Return in plain words how DPO compares with SFT, from the numbers."""
  measured = found["differences"].get("dpo-sft", {})
  groups: dict[str, list[str]] = {"higher": [], "lower": [], "none": []}
  for key, name in HEADLINES.items():
    if key in measured:
      one = measured[key]
      side = "higher" if one["value"] > 0 else "lower"
      groups[side if one["shown"] else "none"].append(name)
  said = [
    f"{start} {_listed(groups[key])}."
    for key, start in (
      ("higher", "DPO is higher than SFT in"),
      ("lower", "DPO is lower than SFT in"),
      ("none", "No difference between DPO and SFT is shown in"),
    )
    if groups[key]
  ]
  if not said:
    said = ["DPO and SFT were not both measured, so nothing is compared."]
  return " ".join([*said, CAUTION])


def arms(stages: Stages, kinds: Mapping[str, str]) -> dict[str, Measures]:
  """Return what was measured, by arm and "GROUP/metric" name."""
  found: dict[str, Measures] = {}
  for arm in ARMS:
    for group, stage in kinds.items():
      measured = stages.get(f"{stage}_{arm}", {"metrics": {}})["metrics"]
      for name, value in measured.items():
        if isinstance(value, Mapping) and "value" in value:
          found.setdefault(arm, {})[f"{group}/{name}"] = dict(value)
  for measures in found.values():
    for name in [n for n in measures if re.search("/(majority|blind)/", n)]:
      del measures[name]
  return found


def differences(
  stages: Stages, kinds: Mapping[str, str]
) -> dict[str, Measures]:
  """Return paired differences by "A-B" and measure."""
  compare = {
    "vqa": _answers_differ,
    "mllm": _answers_differ,
    "linear": _labels_differ,
    "segment": _maps_differ,
    "gradient": _gradients_differ,
  }
  found: dict[str, Measures] = {}
  for one, other in PAIRS:
    for group, stage in kinds.items():
      names = f"{stage}_{one}", f"{stage}_{other}"
      if all(name in stages for name in names):
        folders = [stages[name]["folder"] for name in names]
        for name, value in compare[group](*folders).items():
          found.setdefault(f"{one}-{other}", {})[f"{group}/{name}"] = value
  return found


def paired(
  one: Float[np.ndarray, "N"], other: Float[np.ndarray, "N"]
) -> metrics.Measured:
  """Return the mean of one - other, its SE that of the items' differences."""
  values = np.asarray(one, np.float64) - np.asarray(other, np.float64)
  values = values[np.isfinite(values)]
  error = None
  if len(values) > 1:
    error = float(values.std(ddof=1) / len(values) ** 0.5)
  mean = values.mean() if len(values) else 0.0
  return metrics.measured(mean, len(values), error)


def is_shown(difference: Mapping[str, Any]) -> bool:
  """Return whether a difference is over two standard errors.

  Without an error, or with one of zero (every item or seed the same), nothing
  is known of chance and no difference is shown.
  """
  error = difference["se"]
  return bool(error) and abs(difference["value"]) > 2 * error


def judged(found: Mapping[str, Measures]) -> dict[str, Measures]:
  """Return differences with `shown`."""
  return {
    pair: {k: v | {"shown": is_shown(v)} for k, v in measures.items()}
    for pair, measures in found.items()
  }


def over_seeds(found: list[dict[str, Measures]]) -> dict[str, Measures]:
  """Return means over the seeds that hold a measure, with standard errors.

  With two seeds or more the error is the larger of that across the seeds and
  that over the items. The former is widened by Student's t, so that two of it
  are a 95 % interval however few the seeds. A measure of one seed keeps its
  own standard error, over its items.
  """
  merged: dict[str, Measures] = {}
  for row in dict.fromkeys(name for one in found for name in one):
    rows = [one[row] for one in found if row in one]
    merged[row] = {}
    for name in dict.fromkeys(name for one in rows for name in one):
      values = [one[name] for one in rows if name in one]
      merged[row][name] = values[0]
      if len(values) > 1:
        numbers = np.array([value["value"] for value in values])
        error = float(numbers.std(ddof=1) / len(numbers) ** 0.5)
        error *= float(special.stdtrit(len(numbers) - 1, 0.975)) / 2
        error = max([error, *(v["se"] for v in values if v["se"] is not None)])
        merged[row][name] = metrics.measured(
          numbers.mean(), values[0]["n"], error
        ) | {"seeds": len(values)}
  return merged


def json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Return the objects of a JSON-lines file."""
  lines = path.read_text(encoding="utf-8").split("\n")
  return [json.loads(line) for line in lines if line]


def _answers_differ(one: pathlib.Path, other: pathlib.Path) -> Measures:
  """Compare two `predictions.jsonl`, as evaluate.summarize groups them."""
  left, right = (
    {row["id"]: row for row in json_lines(folder / "predictions.jsonl")}
    for folder in (one, other)
  )
  _check_same(sorted(left), sorted(right), one, other)
  found: Measures = {}
  for field in ("category", "kind"):
    groups: dict[str, list[str]] = {}
    for name, row in left.items():
      groups.setdefault(texts.canonical(row[field]), []).append(name)
    for name, ids in sorted(groups.items()):
      found[f"{field}/{name}"] = paired(
        np.array([left[i]["correct"] for i in ids]),
        np.array([right[i]["correct"] for i in ids]),
      )
  each = [v for k, v in found.items() if k.startswith("category/")]
  errors = [one["se"] for one in each]
  found["all"] = metrics.measured(
    np.mean([one["value"] for one in each]),
    len(left),
    None
    if None in errors
    else float(np.sqrt(np.sum(np.square(errors))) / len(errors)),
  )
  return found


def _labels_differ(one: pathlib.Path, other: pathlib.Path) -> Measures:
  left, right = _arrays(one, other, "predictions.npz")
  _check_same(left["label"].tolist(), right["label"].tolist(), one, other)
  found = {}
  for key in left.keys() & right.keys():
    if key.endswith("_correct"):
      kind, _, way = key.removesuffix("_correct").partition("_")
      name = f"{kind}/{way}_top1" if way else f"{kind}/top1"
      found[name] = paired(left[key], right[key])
  return dict(sorted(found.items()))


def _maps_differ(one: pathlib.Path, other: pathlib.Path) -> Measures:
  """Bootstrap the images, the same ones for both arms."""
  left, right = _arrays(one, other, "counts.npz")
  _check_same(left["id"].tolist(), right["id"].tolist(), one, other)
  images = len(left["id"])
  draws = np.random.default_rng(0).multinomial(
    images, np.full(images, 1 / images), size=RESAMPLES
  )
  whole, drawn = [], []
  for side in (left, right):
    counts = segmentation.Counts(
      **{name: side[name] for name in segmentation.Counts._fields}
    )
    whole.append(segmentation.scores(segmentation.total(counts)))
    resampled = segmentation.Counts(*(draws @ field for field in counts))
    drawn.append(segmentation.scores(resampled))
  return {
    name: metrics.measured(
      whole[0][name] - whole[1][name],
      images,
      float((drawn[0][name] - drawn[1][name]).std(ddof=1)),
    )
    for name in whole[0]
  }


def _gradients_differ(one: pathlib.Path, other: pathlib.Path) -> Measures:
  left, right = _arrays(one, other, "values.npz")
  _check_same(left["id"].tolist(), right["id"].tolist(), one, other)
  names = sorted(k for k in left.keys() & right.keys() if "/" in k)
  return {name: paired(left[name], right[name]) for name in names}


def _check_same(left: Sequence, right: Sequence, one, other) -> None:
  if left != right:
    raise InputError(
      f"{one} and {other}: measured on different items, so they cannot be "
      "compared; delete both and run again on one data set"
    )


def _arrays(one, other, name: str) -> list[dict[str, np.ndarray]]:
  found = []
  for folder in (one, other):
    with np.load(folder / name, allow_pickle=False) as file:
      found.append({key: file[key] for key in file.files})
  return found


def _majority(stages: Stages) -> Measures:
  """Return the majority's shares, under the names of what they compare with."""
  shares = {
    f"vqa/category/{name}": value
    for name, value in _baseline(stages, "majority/").items()
  }
  return shares | _mean_of_categories(shares)


def _blind(stages: Stages) -> Measures:
  """Return what the question alone answers, by what it compares with."""
  shares = {
    f"vqa/{name}": value for name, value in _baseline(stages, "blind/").items()
  }
  return shares | _mean_of_categories(shares)


def _baseline(stages: Stages, prefix: str) -> Measures:
  """Return the shares of a baseline from the first evaluation that has it."""
  for done in stages.values():
    if done["kind"] == "evaluate":
      shares = {
        name.removeprefix(prefix): dict(value)
        for name, value in done["metrics"].items()
        if name.startswith(prefix)
      }
      if shares:
        return shares
  return {}


def _mean_of_categories(shares: Measures) -> Measures:
  every = [x for name, x in shares.items() if name.startswith("vqa/category/")]
  if not every:
    return {}
  mean = np.mean([share["value"] for share in every])
  count = sum(share["n"] for share in every)
  return {"vqa/all": metrics.measured(mean, count, None)}


def _changes(stages: Stages) -> dict[str, Measures]:
  """Return how far each stage's parts moved, as numbers without an error."""
  found: dict[str, Measures] = {}
  for name in ("stage1_full", "stage2_sft", "stage2_dpo"):
    measured = stages.get(name, {"metrics": {}})["metrics"]
    rows = {
      key: metrics.measured(value, 1, None)
      for key, value in measured.items()
      if key.startswith("change/")
    }
    if rows:
      found[name] = rows
  return found


def _lambdas(measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Return by feature kind the lambda of a linear probe and its choice."""
  found: dict[str, dict[str, Any]] = {}
  for name, value in measured.items():
    kind, _, field = name.partition("/")
    if field.startswith("lambda"):
      found.setdefault(kind, {})[field] = value
  return found


def _listed(names: Sequence[str]) -> str:
  """Return "a, b and c"."""
  *most, last = names
  return f"{', '.join(most)} and {last}" if most else last
