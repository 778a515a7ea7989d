"""The section of a stage in a config, what all share, and the arms."""

from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from pivot_jax import names
from pivot_jax.errors import InputError

# What the kinds of the package measure of an arm.
MEASURES = {
  "evaluate": ("vqa", "mllm"),
  "linear_probe": ("linear",),
  "segment_probe": ("segment",),
  "gradcam": ("gradient",),
}


def common(config: ConfigDict, section: ConfigDict) -> dict[str, Any]:
  """Return what every stage gets beside its own section."""
  names = sources(section)
  shared = (
    "tokenizer",
    "vision",
    "llm",
    "resample",
    "compute",
    "mesh",
    "tensorboard",
    "writers",
    "profile",
  )
  common = {
    key: value.to_dict() if isinstance(value, ConfigDict) else value
    for key, value in ((key, config.get(key, ())) for key in shared)
  }
  common["sources"] = {n: config.sources[n].to_dict() for n in names}
  return common


def sources(section: ConfigDict) -> list[str]:
  """Return the names of the sources that a stage reads."""
  data = section.get("data") or ()
  names = [data] if isinstance(data, str) else [name for name, _ in data]
  return names + ([section.blind] if section.get("blind") else [])


def design(config: ConfigDict) -> dict[str, Any]:
  """Return the arms, the pairs that are compared, and what measures an arm.

  `measuring` has by stage its arm and what it measures of it. Raises InputError
  for an arm that the config does not have, two of one name, a stage that
  measures what its kind does not, or pairs of the same rows without trainings.
  """
  arms = [dict(arm) for arm in config.get("arms", ())]
  pairs = [dict(pair) for pair in config.get("compared", ())]
  _check_arms(arms, pairs)
  models = {arm["name"]: arm["model"] for arm in arms}
  measuring: dict[str, tuple[str, str]] = {}
  for name in config.order:
    section = config[name]
    if section.get("arm"):
      measures = (section.arm, section.get("measure", ""))
      _check_measuring(name, section.kind, measures, models, measuring)
      measuring[name] = measures
  for pair in pairs:
    for side in ("one", "other"):
      if pair[side] not in models:
        raise InputError(
          f"compared: {pair[side]!r} is no arm; the arms are {', '.join(models)}"
        )
      model = models[pair[side]]
      trained = model in config and config[model].kind == "train"
      if pair["same_rows"] and not trained:
        raise InputError(
          f"compared: {pair[side]!r} has the model {model!r}, which is no "
          "training of this run: same_rows needs two of them"
        )
  return {"arms": arms, "compared": pairs, "measuring": measuring}


def _check_arms(
  arms: list[dict[str, Any]], pairs: list[dict[str, Any]]
) -> None:
  """Raise for an arm or a pair that lacks a field, and for names given twice."""
  wanted = (
    ("arms", arms, ("name", "model", "label", "short")),
    ("compared", pairs, ("one", "other", "same_rows")),
  )
  for what, entries, fields in wanted:
    for entry in entries:
      missing = [field for field in fields if field not in entry]
      if missing:
        raise InputError(f"{what}: {entry} has no {missing[0]!r}")
  for field in ("name", "label", "short"):
    values = [arm[field] for arm in arms]
    twice = [value for value in values if values.count(value) > 1]
    if twice:
      raise InputError(f"arms: two have the {field} {twice[0]!r}")


def _check_measuring(
  name: str,
  kind: str,
  measures: tuple[str, str],
  arms: Iterable[str],
  before: dict[str, tuple[str, str]],
) -> None:
  arm, measure = measures
  if arm not in arms:
    raise InputError(f"{name}.arm={arm!r}: the arms are {', '.join(arms)}")
  every = [x for known in MEASURES.values() for x in known]
  known = MEASURES.get(kind, ())
  wrong = measure in every if names.is_own(kind) else measure not in known
  if wrong:
    may = f"choose one of {', '.join(known)}" if known else "choose another"
    raise InputError(f"{name}.measure={measure!r}: {may}")
  same = [other for other, found in before.items() if found == measures]
  if same and measure:
    raise InputError(f"{name} and {same[0]} both measure {measure} of {arm}")
