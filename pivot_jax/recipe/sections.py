"""The section of a stage in a config, what all share, and the arms."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from pivot_jax import addresses, names
from pivot_jax.errors import InputError
from pivot_jax.report import compare

# What the kinds of the package measure of an arm.
MEASURES = {
  "evaluate": ("vqa", "mllm"),
  "linear_probe": ("linear",),
  "segment_probe": ("segment",),
  "gradcam": ("gradient",),
}

# How a training keeps its checkpoints; configs may have nothing on it.
_SAVING = ("keep_every", "save_concurrent_gb", "restore_concurrent_gb")


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
  shared += tuple(key for key in _SAVING if key in config)
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
  for an arm or a pair that is none, an arm that the config does not have, two
  of one name, a model that is neither a stage nor an address, a stage that
  measures what its kind does not, or pairs of the same rows without trainings.
  """
  arms = _entries(config, "arms", ("name", "model", "label", "short"))
  pairs = _entries(config, "compared", ("one", "other", "same_rows"))
  _check_arms(arms, config)
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
          f"compared: {pair[side]!r} is no arm; {_listed(models)}"
        )
      model = models[pair[side]]
      trained = _is_stage(model, config) and config[model].kind == "train"
      if pair["same_rows"] and not trained:
        raise InputError(
          f"compared: {pair[side]!r} has the model {model!r}, which is no "
          "training of this run: same_rows needs two of them"
        )
  return {"arms": arms, "compared": pairs, "measuring": measuring}


def _entries(
  config: ConfigDict, what: str, fields: Sequence[str]
) -> list[dict[str, Any]]:
  """Return the arms or pairs of a config; raise for one that is none."""
  made = {"arms": "common.arm(...)", "compared": "common.pair(...)"}[what]
  given = config.get(what, ())
  if not isinstance(given, (tuple, list)):
    raise InputError(f"{what}={given!r}: give a tuple, as ({made},)")
  for entry in given:
    if not isinstance(entry, (Mapping, ConfigDict)):
      raise InputError(f"{what}: {entry!r} is none: give {made}")
    for field in fields:
      if field not in entry:
        raise InputError(f"{what}: {entry} has no {field!r}")
      value = entry[field]
      if field == "same_rows" and not isinstance(value, bool):
        raise InputError(f"{what}: {field}={value!r}: give True or False")
      text = isinstance(value, str) and value.strip()
      if field != "same_rows" and not text:
        raise InputError(f"{what}: {entry}: {field}={value!r}: give a text")
  return [dict(entry) for entry in given]


def _check_arms(arms: list[dict[str, Any]], config: ConfigDict) -> None:
  """Raise for names given twice, and for a model that is nowhere."""
  for field in ("name", "label", "short"):
    values = [arm[field] for arm in arms]
    twice = [value for value in values if values.count(value) > 1]
    if twice:
      raise InputError(f"arms: two have the {field} {twice[0]!r}")
  for arm in arms:
    name, label, model = arm["name"], arm["label"], arm["model"]
    if label in compare.BASELINES.values():
      raise InputError(
        f"arms: {name!r} has the label {label!r}, by which the report calls a "
        "baseline: choose another"
      )
    if not _is_stage(model, config) and not addresses.is_there(model):
      raise InputError(
        f"arms: {name!r} has the model {model!r}, which is no stage of the "
        "config, and no file or folder: give one of them"
      )


def _is_stage(name: str, config: ConfigDict) -> bool:
  """Return whether a config has a stage of a name, whether or not it runs."""
  return (
    name in config
    and isinstance(config[name], ConfigDict)
    and "kind" in config[name]
  )


def _listed(arms: Iterable[str]) -> str:
  names = ", ".join(arms)
  return f"the arms are {names}" if names else "the config has no arms (c.arms)"


def _check_measuring(
  name: str,
  kind: str,
  measures: tuple[str, str],
  arms: Iterable[str],
  before: dict[str, tuple[str, str]],
) -> None:
  arm, measure = measures
  if arm not in arms:
    raise InputError(f"{name}.arm={arm!r}: {_listed(arms)}")
  every = [x for known in MEASURES.values() for x in known]
  known = MEASURES.get(kind, ())
  wrong = measure in every if names.is_own(kind) else measure not in known
  if wrong:
    may = f"choose one of {', '.join(known)}" if known else "choose another"
    raise InputError(f"{name}.measure={measure!r}: {may}")
  same = [other for other, found in before.items() if found == measures]
  if same and measure:
    raise InputError(f"{name} and {same[0]} both measure {measure} of {arm}")
