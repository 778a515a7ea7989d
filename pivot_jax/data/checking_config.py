"""What is to be checked: files as they are, or the sources of a config.

A config is read as `main` reads it, without its flags, and nothing of it is
used but `sources` and the numbers that rows are measured by.
"""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from pivot_jax.data import checking_rows, images, registry
from pivot_jax.errors import InputError

# Kinds of entry that leave a line that is no record for later, if asked to.
_FLAWED = ("llava", "llava_text", "preference", "eval", "mixture", "mmpr")
# Of an entry: how its rows are used, and not what they are.
_USE = ("given_by", "max_bad", "bad", "group", "image_size", "resample")


class Entry(NamedTuple):
  """A file or folder to check.

  images: the folder of its image paths, None for its own.
  max_length: tokens of a row; 0: any number.
  spec: the config's entry, as JSON; "" if it was named alone.
  """

  path: str
  images: str | None
  max_length: int
  max_pixels: int = images.MAX_PIXELS
  spec: str = ""

  def open(self) -> Any:
    """Returns the source; raises as `checking_rows.open_file`."""
    if self.spec:
      return checking_rows.open_entry(json.loads(self.spec))
    return checking_rows.open_file(self.path, self.images)


class Wanted(NamedTuple):
  """What to check, by which tokenizer and with how many tokens an image."""

  entries: tuple[Entry, ...]
  tokenizer: str
  patches: int


def is_config(text: str) -> bool:
  """Returns whether an argument names a config, as configs/pivot.py:files."""
  return re.fullmatch(r".+\.py(:.*)?", text, re.DOTALL) is not None


def read(
  config: str,
  overrides: Sequence[str],
  *,
  max_length: int | None,
  patches: int,
) -> Wanted:
  """Returns the sources of a config that have a path, each once.

  Args:
    overrides: of its values, as `--config.key=value`.
    max_length: instead of those of the stages that use a source.
    patches: if the config does not say it, as its encoder is elsewhere.

  Raises:
    InputError: the config cannot be read, or names no files.
  """
  found = _load(config, overrides)
  if "sources" not in found:
    raise InputError(f"{config}: has no sources; give the files instead")
  entries: dict[str, Entry] = {}
  for name, spec in found.sources.to_dict().items():
    if not spec.get("path"):
      continue
    spec = {key: spec[key] for key in spec if key not in _USE}
    entry = _entry(spec, _limit(found, name, max_length))
    key = entry.spec
    known = entries.get(key, entry)
    limits = [e.max_length for e in (known, entry) if e.max_length]
    entries[key] = entry._replace(max_length=min(limits, default=0))
  kept = _without_texts(entries.values())
  if not kept:
    raise InputError(f"{config}: its sources name no files")
  return Wanted(kept, found.get("tokenizer", ""), _patches(found, patches))


def _entry(spec: Mapping[str, Any], max_length: int) -> Entry:
  """Returns what to open for an entry of a config."""
  spec = dict(spec)
  place = pathlib.Path(spec["path"])
  of_rows = spec["kind"] in registry.ROWS
  kind = (of_rows and registry.format_of(place)) or spec["kind"]
  if kind in _FLAWED:
    spec["flawed"] = True
  return Entry(
    path=str(place / spec["split"] if "split" in spec else place),
    images=spec.get("image_root") or None,
    max_length=max_length,
    max_pixels=spec.get("max_pixels", images.MAX_PIXELS),
    spec=json.dumps(spec, sort_keys=True),
  )


def _limit(config: ConfigDict, name: str, max_length: int | None) -> int:
  """Returns the least max_length of the stages that read a source."""
  if max_length is not None:
    return max_length
  limits = [
    section.max_length
    for section in config.values()
    if isinstance(section, ConfigDict)
    and {"data", "max_length"} <= set(section)
    and name in _names(section.data)
  ]
  return min((limit for limit in limits if limit), default=0)


def _names(data: str | Sequence[tuple[str, float]]) -> list[str]:
  """Returns the sources of a stage, which are one, or several by weight."""
  return [data] if isinstance(data, str) else [name for name, _ in data]


def _without_texts(entries) -> tuple[Entry, ...]:
  """Leaves out files that are read without images and with them as well."""
  kinds = [(entry, json.loads(entry.spec)["kind"]) for entry in entries]
  whole = {entry.path for entry, kind in kinds if kind == "llava"}
  return tuple(
    entry
    for entry, kind in kinds
    if kind != "llava_text" or entry.path not in whole
  )


def _patches(config: ConfigDict, default: int) -> int:
  """Returns the tokens of an image, unless weights from elsewhere say them."""
  vision = config.get("vision")
  if vision is None or not vision.init.startswith("package:"):
    return default
  return (vision.image_size // vision.patch_size) ** 2


def _load(config: str, overrides: Sequence[str]) -> ConfigDict:
  """Runs a config file and sets its values."""
  file = re.sub(r"(?<=\.py):.*", "", config, flags=re.DOTALL)
  if not pathlib.Path(file).is_file():
    raise InputError(f"{file}: no such config")
  argv = ["check", f"--config={config}", *overrides]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  try:
    values(argv)
    found = values["config"].value
  except AttributeError as error:
    # The words of a KeyError, quoted once or twice.
    words = " ".join(re.findall(r"[\w.]+", str(error).replace(r"\n", " ")))
    raise InputError(f"{config}: has no value {words}") from None
  except flags.Error as error:
    last = str(error).strip().splitlines()[-1]
    raise InputError(f"{config}: {last}") from None
  # A config file is a program and may raise anything.
  except Exception as error:  # noqa: BLE001
    words = " ".join(f"{type(error).__name__}: {error}".split())
    raise InputError(f"{config}: {words}") from None
  if not isinstance(found, ConfigDict):
    raise InputError(f"{config}: its get_config returns no ConfigDict")
  return found
