"""The page of the report, from its record and the folders of the stages.

It computes no metric: the comparison is compare.py's. Columns of a stage that
did not run are absent. Of several seeds the tables show the means, curves and
pictures the first. Legend: K examples, g grid side, H W pixels.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from pivot_jax import files, goodput, metrics
from pivot_jax.data.scenes import descriptions
from pivot_jax.report import charts, compare, markup, tables

_CHARTS = {
  "loss": ("losses/total",),
  "rewards": ("rewards/margins", "rewards/chosen", "rewards/rejected"),
  "share of pairs ranked right": ("rewards/accuracies",),
}


def page(
  title: str,
  lead: str,
  record: Mapping[str, Any],
  stages: compare.Stages,
  design: compare.Design,
) -> str:
  """Return the whole document; `lead` is what it says first."""
  found, seeds = record["results"], record["seeds"]
  error = (
    f"(the larger of that across {seeds} seeds and that over the items)"
    if seeds > 1
    else "over the items of one run"
  )
  columns = _columns(found)
  return markup.document(
    title,
    [
      markup.PARTS.verdict(lead),
      _skipped(record["left_out"]),
      markup.section(
        "Arms",
        tables.measures(
          _named(found["arms"], design) | _baselines(found), columns
        ),
        note=f"Value ± standard error {error}. Shares in percent; gradients: "
        "their share on the asked-about object over the object's share of the "
        "image (1 = not looking for it). Majority answer: always the "
        "most frequent answer of a category. Question alone: the most frequent "
        "answer to each question.",
      ),
      markup.section(
        "Differences",
        tables.differences(_pairs(found["differences"], design), columns),
        note="Value ± paired standard error " + error + ". Within 2 standard "
        "errors no difference is shown; of twenty comparisons of equal arms "
        "about one is still beyond them.",
      ),
      _mllms(found, design),
      _changes_table(found["change"]),
      _lambdas_table(found["lambda"]),
      _others(found.get("other", {})),
      markup.section("Training", _curves(stages, design)),
      markup.section(
        "Where the gradient is",
        *_gradient_examples(stages, design),
        note="The gradient of each loss on the encoder's output, cleaned as in "
        "the paper, drawn from blue (none) to red over the darkened image.",
      ),
      markup.section("Segmentation", *_segment_examples(stages, design)),
      _what_ran(record),
    ],
  )


def _columns(found: Mapping[str, Any]) -> list[tables.Column]:
  """Return the main table's columns; those without numbers are not shown."""
  names = {name for one in found["arms"].values() for name in one}
  vqa = "Re-assembled MLLM: VQA, %"
  linear, segment = "Linear probe, %", "Segmentation, %"
  gradient = "Gradient on the object, ratio"
  categories = sorted(n for n in names if n.startswith("vqa/category/"))
  return [
    *(tables.Column(n, vqa, n.split("/", 2)[2], 100, 1) for n in categories),
    tables.Column("vqa/all", vqa, "mean", 100, 1),
    tables.Column("linear/encoder/top1", linear, "encoder", 100, 1),
    tables.Column("linear/projector/top1", linear, "projector", 100, 1),
    tables.Column("segment/macro_recall", segment, "macro recall", 100, 1),
    tables.Column("segment/miou", segment, "mIoU", 100, 1),
    tables.Column("gradient/encoder/sft", gradient, "encoder, SFT", 1, 2),
    tables.Column("gradient/encoder/dpo_total", gradient, "encoder, DPO", 1, 2),
    tables.Column("gradient/projector/sft", gradient, "projector, SFT", 1, 2),
    tables.Column(
      "gradient/projector/dpo_total", gradient, "projector, DPO", 1, 2
    ),
  ]


def _named(found, design: compare.Design) -> dict[str, Any]:
  """Return the rows of a table of arms, under the names a reader knows."""
  return {design.arms[arm]["label"]: found[arm] for arm in found}


def _baselines(found) -> dict[str, Any]:
  """Return the rows of what needs no image; those without numbers are absent."""
  names = compare.BASELINES
  return {names[key]: found[key] for key in names if found[key]}


def _pairs(found, design: compare.Design) -> dict[str, Any]:
  names = {
    f"{pair['one']}-{pair['other']}": " − ".join(
      design.short(pair[side]) for side in ("one", "other")
    )
    for pair in design.pairs
  }
  return {names[pair]: measures for pair, measures in found.items()}


def _mllms(found: Mapping[str, Any], design: compare.Design) -> Markup:
  """Return the tables of the MLLMs that the encoders were cut out of."""
  names = {name for one in found["mllms"].values() for name in one}
  columns = [
    tables.Column(name, group, name.split("/", 2)[2], 100, 1)
    for group in ("category", "kind")
    for name in sorted(n for n in names if n.startswith(f"mllm/{group}/"))
  ]
  columns.append(tables.Column("mllm/all", "mean", "of categories", 100, 1))
  blind = {
    name.replace("vqa/", "mllm/", 1): value
    for name, value in found["blind"].items()
  }
  baseline = {compare.BASELINES["blind"]: blind} if blind else {}
  return markup.section(
    "The MLLMs before their encoders are cut out",
    tables.measures(_named(found["mllms"], design) | baseline, columns),
    tables.differences(_pairs(found["mllm_differences"], design), columns),
    note="VQA by generation, exact match in percent.",
  )


def _changes_table(change: Mapping[str, Any]) -> Markup:
  parts = ("vision", "projector", "llm")
  columns = [
    tables.Column(
      f"change/{part}", "‖after − before‖ / ‖before‖, %", part, 100, 2
    )
    for part in parts
  ]
  return markup.section(
    "How far the weights moved",
    tables.measures(change, columns),
    note="Relative to what each stage started from.",
  )


def _lambdas_table(found: Mapping[str, Any]) -> Markup:
  """Return which lambda each linear probe took; empty without a probe."""
  rows = [
    (
      stage,
      kind,
      f"{one['lambda']:g}",
      one["lambda_chosen_by"],
      "yes" if one["lambda_at_end"] else "no",
    )
    for stage, kinds in found.items()
    for kind, one in kinds.items()
  ]
  if not rows:
    return Markup()
  header = ("stage", "features", "lambda", "chosen by", "at an end of the grid")
  return markup.section(
    "Lambda of the linear probes",
    markup.PARTS.plain_table(header, rows),
    note="Chosen by the accuracy on held-out training images. At an end of the "
    "grid a better lambda may lie beyond it; chosen by default: no lambda was "
    "better than another.",
  )


def _skipped(reasons: Mapping[str, str]) -> Markup:
  if not reasons:
    return Markup()
  return markup.PARTS.skipped(sorted(reasons.items()))


def _others(found: Mapping[str, Any]) -> Markup:
  """Return the numbers of kinds of stages that this page knows nothing of."""
  rows = [
    (stage, name, *_plain_number(value))
    for stage, measured in found.items()
    for name, value in measured.items()
  ]
  if not rows:
    return Markup()
  return markup.section(
    "Other measurements",
    markup.PARTS.plain_table(("stage", "measure", "value", "± SE", "n"), rows),
  )


def _plain_number(value: Any) -> tuple[str, str, str]:
  """Return value, standard error and n of a number as text."""
  if not isinstance(value, Mapping) or "value" not in value:
    return str(value), "", ""
  error = value.get("se")
  shown = "" if error is None else f"{error:.3g}"
  return f"{value['value']:.4g}", shown, str(value.get("n", ""))


def _curves(stages: compare.Stages, design: compare.Design) -> Markup:
  """Return the charts of the trainings that made the arms."""
  drawn = []
  for arm in design.arms.values():
    if stages.get(arm["model"], {}).get("kind") != "train":
      continue
    lines = metrics.read(stages[arm["model"]]["folder"])
    for title, fields in _CHARTS.items():
      series = {
        field: [(x["step"], x[field]) for x in lines if field in x]
        for field in fields
        if any(field in x for x in lines)
      }
      if series:
        drawn.append(charts.chart(f"{arm['short']}: {title}", series))
  return markup.PARTS.grid(drawn) if any(drawn) else Markup()


def _gradient_examples(
  stages: compare.Stages, design: compare.Design, count: int = 4
) -> list[Markup]:
  """Return examples with each arm's maps, of as many kinds as there are."""
  runs = _pictures(stages, design, "gradient")
  if not runs:
    return []
  texts = {}
  for arm in runs:
    folder = stages[design.stage(arm, "gradient")]["folder"]
    texts[arm] = files.read_json(folder / "examples.json")
  first = next(iter(runs))
  # An arm that drew other examples is not beside these.
  runs = {arm: maps for arm, maps in runs.items() if texts[arm] == texts[first]}
  kinds = [row["kind"] for row in texts[first]]
  fresh = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
  rest = [i for i in range(len(kinds)) if i not in fresh]
  shown = []
  for index in sorted([*fresh, *rest][:count]):
    row, maps = texts[first][index], runs[first]
    image, mask = maps["images"][index], maps["masks"][index]
    rows = []
    for loss, name in (("sft", "SFT loss"), ("dpo_total", "DPO loss")):
      key = f"picture/encoder/{loss}"
      start = (
        (charts.picture(image, "image"),)
        if loss == "sft"
        else (
          charts.picture(charts.spotlight(image, mask), "asked-about object"),
        )
      )
      rows.append(
        _row(
          *start,
          *(
            charts.picture(
              charts.overlay(one["images"][index], one[key][index]),
              f"{design.short(arm)}: {name}",
            )
            for arm, one in runs.items()
            if key in one
          ),
        )
      )
    names = ("question", "chosen", "rejected")
    shown.append(
      markup.PARTS.example([(n.capitalize(), row[n]) for n in names], rows)
    )
  return shown


def _segment_examples(
  stages: compare.Stages, design: compare.Design, count: int = 6
) -> list[Markup]:
  """Return a few images with their true and predicted class maps."""
  runs = _pictures(stages, design, "segment")
  if not runs:
    return []
  first = next(iter(runs.values()))
  held = [first["labels"], *(maps["predicted"] for maps in runs.values())]
  used = np.unique(np.concatenate([one.ravel() for one in held]))
  used = used[(used >= 0) & (used < 10_000)]
  colours = charts.class_colours(int(used.max(initial=0)) + 1)
  names = _class_names(stages, int(used.max(initial=0)) + 1)
  rows = []
  for index in range(min(count, len(first["images"]))):
    drawn = [
      charts.picture(
        charts.class_map(maps["predicted"][index], colours),
        design.arms[arm]["label"],
      )
      for arm, maps in runs.items()
      if index < len(maps["predicted"])
    ]
    truth = charts.class_map(first["labels"][index], colours)
    rows.append(
      _row(
        charts.picture(first["images"][index], "image"),
        charts.picture(truth, "labels"),
        *drawn,
      )
    )
  key = markup.PARTS.legend(
    (names[i], charts.hexadecimal(colours[i])) for i in used.tolist()
  )
  return [key, *rows]


def _class_names(stages: compare.Stages, count: int) -> list[str]:
  """Return the scenes' class names, of other data the numbers."""
  fields = next(
    done["fields"]
    for done in stages.values()
    if done["kind"] == "segment_probe"
  )
  sources = fields.get("sources", {}).values()
  scenes = sources and all(one.get("kind") == "scenes" for one in sources)
  if scenes and count <= len(descriptions.LABELS):
    return list(descriptions.LABELS[:count])
  return [f"class {index}" for index in range(count)]


def _pictures(
  stages: compare.Stages, design: compare.Design, measure: str
) -> dict[str, Any]:
  """Return the arrays of `maps.npz` by arm."""
  found = {}
  for arm in design.arms:
    stage = design.stage(arm, measure)
    if stage in stages:
      path = stages[stage]["folder"] / "maps.npz"
      with np.load(path, allow_pickle=False) as file:
        found[arm] = {key: file[key] for key in file.files}
  return found


def _what_ran(record: Mapping[str, Any]) -> Markup:
  ran, spent = record["stages"], record["goodput"]
  total = sum(one["seconds"] for one in ran.values())
  rows = [(n, one["kind"], f"{one['seconds']:.1f}") for n, one in ran.items()]
  return markup.section(
    "What ran",
    markup.PARTS.plain_table(
      ("stage", "kind", "seconds"), [*rows, ("total", "", f"{total:.1f}")]
    ),
    _details("Configuration", record["config"]),
    _details("Versions", record["versions"]),
    _details("Rows and start of arms that share them", record["comparison"]),
    note=f"{len(ran)} stages, {record['seeds']} seed(s). {_goodput(spent)}",
  )


def _goodput(spent: Mapping[str, Any]) -> str:
  """Return in a sentence how much of the run's time was of use."""
  if not spent["wall"]:
    return ""
  share = 100 * spent["useful"] / spent["wall"]
  lost = ", ".join(
    f"{name} {spent[name]:.0f} s"
    for name in (*goodput.SPENT, "lost")
    if spent[name] >= 0.5
  )
  return (
    f"Of {spent['wall']:.0f} s in {spent['starts']} start(s), {share:.1f} % were "
    f"of use; the rest: {lost or 'under a second'}; updates done twice: "
    f"{spent['again']}."
  )


def _row(*pictures: Markup) -> Markup:
  return markup.PARTS.picture_row(pictures)


def _details(title: str, content: Mapping[str, Any]) -> Markup:
  """Return a folded block of JSON."""
  shown = json.dumps(content, indent=2, sort_keys=True, default=str)
  return markup.PARTS.details(title, shown)
