"""Compares the arms: their numbers side by side, and paired differences.

Reads what the measuring stages left (done.json's metrics, predictions item by
item) and returns means, differences and standard errors. Differences are
paired: both arms answered the same items, so the error is that of the items'
differences. It measures no model and draws nothing. Legend: N items.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special

from pivot_jax import files, metrics, texts
from pivot_jax.errors import InputError
from pivot_jax.evals import segmentation

# What is measured of an arm; "mllm" is of the model before it is cut apart.
MEASURES = ("vqa", "linear", "segment", "gradient")
WHOLE = "mllm"
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
# Rows of the tables beside the arms, by their key in the results.
BASELINES = {"majority": "majority answer", "blind": "question alone"}
RESAMPLES = 500
# Bytes of a file of predictions.
_LARGEST = 2**30
Measures = dict[str, metrics.Measured]
# Per stage its done.json and, under "folder", where it is.
Stages = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Design:
  """The arms of an experiment, the stages that measure them, and the pairs.

  Attributes:
    arms: by name the `label`, `short` and `model` of an arm, in order.
    pairs: `one`, `other` and `same_rows` of the arms that are compared.
    measuring: by stage the arm that it measures, and what it measures of it.
  """

  arms: Mapping[str, Mapping[str, str]]
  pairs: Sequence[Mapping[str, Any]]
  measuring: Mapping[str, tuple[str, str]]

  @classmethod
  def of(cls, config: Mapping[str, Any]) -> "Design":
    """Return the design that a report's section holds."""
    measuring = {
      stage: (arm, measure)
      for stage, (arm, measure) in config.get("measuring", {}).items()
    }
    arms = {arm["name"]: arm for arm in config.get("arms", ())}
    return cls(arms, tuple(config.get("compared", ())), measuring)

  def stage(self, arm: str, measure: str) -> str:
    """Return the stage that measures an arm, "" if there is none."""
    found = [k for k, v in self.measuring.items() if v == (arm, measure)]
    return found[0] if found else ""

  def short(self, arm: str) -> str:
    """Return an arm's name in differences and charts."""
    return self.arms[arm]["short"]


def by_seed(inputs: Mapping[str, str]) -> dict[int, dict[str, dict[str, Any]]]:
  """Return per seed the stages' records, by names without their seed."""
  found: dict[int, dict[str, dict[str, Any]]] = {}
  for name, address in inputs.items():
    match = re.fullmatch(r"(?:seed(\d+)/)?(.+)", name)
    folder = pathlib.Path(address)
    needs = ("kind", "fields", "metrics", "seconds", "versions")
    done = metrics.read_record(folder / "done.json", *needs)
    done |= {"stage": name, "folder": folder}
    found.setdefault(int(match[1] or 0), {})[match[2]] = done
  return dict(sorted(found.items()))


def same_rows(
  seeds: Mapping[int, Stages], design: Design
) -> dict[str, dict[str, str]]:
  """Return rows and start of pairs that share them; raise if they do not."""
  found = {}
  for pair in design.pairs:
    names = [design.arms[pair[side]]["model"] for side in ("one", "other")]
    for seed, stages in seeds.items():
      if not pair["same_rows"] or any(name not in stages for name in names):
        continue
      one, other = (stages[name] for name in names)
      for field in ("rows", "init"):
        values = [stage["metrics"][field] for stage in (one, other)]
        if values[0] != values[1]:
          raise InputError(
            f"{one['folder']}/done.json: {field} is {values[0]}, in "
            f"{other['folder']} {values[1]}: {design.short(pair['other'])} and "
            f"{design.short(pair['one'])} are only comparable on the same rows "
            "from the same weights; give both the same data, data_seed, batch, "
            "steps and init"
          )
      key = f"{pair['one']}-{pair['other']}, seed {seed}"
      found[key] = {name: one["metrics"][name] for name in ("rows", "init")}
  return found


def results(seeds: Mapping[int, Stages], design: Design) -> dict[str, Any]:
  """Return every number of the report, without times."""
  first = next(iter(seeds.values()), {})

  def each(measured: Callable[..., Any], *measures: str):
    return over_seeds([measured(x, design, measures) for x in seeds.values()])

  found = {
    "arms": each(arms, *MEASURES),
    "differences": judged(each(differences, *MEASURES)),
    "majority": _majority(first),
    "blind": _blind(first),
    "mllms": each(arms, WHOLE),
    "mllm_differences": judged(each(differences, WHOLE)),
    "change": over_seeds([_changes(x, design) for x in seeds.values()]),
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
  other = {
    done["stage"]: done["metrics"]
    for stages in seeds.values()
    for done in stages.values()
    if done["kind"] not in KNOWN
  }
  # Only where there are any: results of runs without them stay what they are.
  return found | ({"other": other} if other else {})


def verdict(found: Mapping[str, Any], design: Design) -> str:
  """Return in plain words how the first pair compares, from the numbers."""
  if not design.pairs:
    return ""
  pair = design.pairs[0]
  one, other = design.short(pair["one"]), design.short(pair["other"])
  measured = found["differences"].get(f"{pair['one']}-{pair['other']}", {})
  groups: dict[str, list[str]] = {"higher": [], "lower": [], "none": []}
  for key, name in HEADLINES.items():
    if key in measured:
      value = measured[key]
      side = "higher" if value["value"] > 0 else "lower"
      groups[side if value["shown"] else "none"].append(name)
  said = [
    f"{start} {_listed(groups[key])}."
    for key, start in (
      ("higher", f"{one} is higher than {other} in"),
      ("lower", f"{one} is lower than {other} in"),
      ("none", f"No difference between {one} and {other} is shown in"),
    )
    if groups[key]
  ]
  if not said:
    return f"{one} and {other} were not both measured, so nothing is compared."
  return " ".join(said)


def arms(
  stages: Stages, design: Design, measures: Sequence[str]
) -> dict[str, Measures]:
  """Return what was measured, by arm and "MEASURE/metric" name."""
  found: dict[str, Measures] = {}
  for arm in design.arms:
    for measure in measures:
      done = stages.get(design.stage(arm, measure), {"metrics": {}})
      for name, value in done["metrics"].items():
        if isinstance(value, Mapping) and "value" in value:
          found.setdefault(arm, {})[f"{measure}/{name}"] = dict(value)
  for values in found.values():
    for name in [n for n in values if re.search("/(majority|blind)/", n)]:
      del values[name]
  return found


def differences(
  stages: Stages, design: Design, measures: Sequence[str]
) -> dict[str, Measures]:
  """Return paired differences by "A-B" and measure."""
  found: dict[str, Measures] = {}
  for pair in design.pairs:
    one, other = pair["one"], pair["other"]
    for measure in measures:
      names = design.stage(one, measure), design.stage(other, measure)
      differ = _DIFFER.get(stages.get(names[0], {}).get("kind", ""))
      if differ and names[1] in stages:
        folders = [stages[name]["folder"] for name in names]
        for name, value in differ(*folders).items():
          found.setdefault(f"{one}-{other}", {})[f"{measure}/{name}"] = value
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
  """Return the objects of a JSON-lines file; InputError names a bad line."""
  data = files.read_bytes(path, largest=_LARGEST)
  lines = data.decode("utf-8", "backslashreplace").split("\n")
  return [
    files.parse_line(line, f"{path}, line {place}")
    for place, line in enumerate(lines, 1)
    if line
  ]


def _answers_differ(one: pathlib.Path, other: pathlib.Path) -> Measures:
  """Compare two `predictions.jsonl`, as evaluate.summarize groups them."""
  left, right = map(_answers, (one, other))
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


def _answers(folder: pathlib.Path) -> dict[str, Mapping[str, Any]]:
  """Return the rows of predictions.jsonl by id."""
  path = folder / "predictions.jsonl"
  found = {}
  for place, row in enumerate(json_lines(path), 1):
    for name in ("id", "category", "kind"):
      if not isinstance(row.get(name), str):
        raise InputError(f"{path}, row {place}: {name} is no text")
    if not isinstance(row.get("correct"), bool):
      raise InputError(f"{path}, row {place}: correct is not true or false")
    found[row["id"]] = row
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
        name.removeprefix(prefix): _share(value, f"{name} of {done['stage']}")
        for name, value in done["metrics"].items()
        if name.startswith(prefix)
      }
      if shares:
        return shares
  return {}


def _share(value: Any, where: str) -> dict[str, Any]:
  """Return a measured share that was read; raise if it is none."""
  if not isinstance(value, dict) or not {"value", "n"} <= value.keys():
    raise InputError(f"{where} is no share with its n: the record is damaged")
  return dict(value)


def _mean_of_categories(shares: Measures) -> Measures:
  every = [x for name, x in shares.items() if name.startswith("vqa/category/")]
  if not every:
    return {}
  mean = np.mean([share["value"] for share in every])
  count = sum(share["n"] for share in every)
  return {"vqa/all": metrics.measured(mean, count, None)}


def _changes(stages: Stages, design: Design) -> dict[str, Measures]:
  """Return how far the parts of arms whose encoder trained have moved."""
  found: dict[str, Measures] = {}
  for arm in design.arms.values():
    measured = stages.get(arm["model"], {"metrics": {}})["metrics"]
    if measured.get("change/vision"):
      found[arm["model"]] = {
        key: metrics.measured(metrics.number(value, key), 1, None)
        for key, value in measured.items()
        if key.startswith("change/")
      }
  return found


def _lambdas(measured: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Return by feature kind the lambda of a linear probe and its choice."""
  found: dict[str, dict[str, Any]] = {}
  for name, value in measured.items():
    kind, _, field = name.partition("/")
    if field == "lambda":
      metrics.number(value, name)
    if field.startswith("lambda"):
      found.setdefault(kind, {})[field] = value
  return found


def _listed(names: Sequence[str]) -> str:
  """Return "a, b and c"."""
  *most, last = names
  return f"{', '.join(most)} and {last}" if most else last


_DIFFER = {
  "evaluate": _answers_differ,
  "linear_probe": _labels_differ,
  "segment_probe": _maps_differ,
  "gradcam": _gradients_differ,
}
# Kinds whose numbers have a place of their own in the report.
KNOWN = (*_DIFFER, "train", "score", "detach", "report")
