"""The section of a stage in a config: its sources, and the fields all share."""

from typing import Any

from ml_collections import ConfigDict


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
    "profile",
  )
  common = {
    key: value.to_dict() if isinstance(value, ConfigDict) else value
    for key, value in ((key, config[key]) for key in shared)
  }
  common["sources"] = {n: config.sources[n].to_dict() for n in names}
  return common


def sources(section: ConfigDict) -> list[str]:
  """Return the names of the sources that a stage reads."""
  data = section.get("data") or ()
  names = [data] if isinstance(data, str) else [name for name, _ in data]
  return names + ([section.blind] if section.get("blind") else [])
