"""What is to be checked: files as they are, or the sources of a config.

A config is read as `main` reads it, without its flags, and nothing of it is
used but `sources`, and how the stages read them (`checking_stages.py`).
"""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from pivot_jax.data import images, opener
from pivot_jax.data.tools import (
  check_encoder,
  check_files,
  check_rows,
  check_stages,
)
from pivot_jax.errors import InputError

# Of an entry: how its rows are used, and not what they are.
_USE = ("given_by", "max_bad", "bad", "group", "image_size", "resample")
# How texts are read where no stage says it.
ALONE = check_rows.Reading("qwen_1_5", "paper", True, 0, "error")
# What a config file may raise, as a program of somebody else's.
_BROKEN = (
  ArithmeticError, AssertionError, ImportError, LookupError, NameError,
  OSError, RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip


class Entry(NamedTuple):
  """A file or folder to check.

  images: the folder of its image paths, None for its own.
  max_bad: the share of its rows that may be bad.
  spec: the config's entry, as JSON; "" if it was named alone.
  """

  path: str
  images: str | None
  readings: tuple[check_rows.Reading, ...]
  frames: tuple[check_rows.Frame, ...] = ()
  max_pixels: int = images.MAX_PIXELS
  max_bad: float = 0.0
  spec: str = ""

  @property
  def max_length(self) -> int:
    """The least number of tokens that a row may have; 0: any number."""
    limits = (reading.max_length for reading in self.readings)
    return min((limit for limit in limits if limit), default=0)

  @property
  def long(self) -> str:
    """What becomes of longer rows, "" where they are errors."""
    return ", ".join(
      sorted({r.long for r in self.readings if r.max_length} - {"error"})
    )

  def open(self) -> Any:
    """Return the source; raises as `checking_files.open_file`."""
    if self.spec:
      return check_files.open_entry(json.loads(self.spec))
    return check_files.open_file(self.path, self.images)


class Wanted(NamedTuple):
  """What to check, and by what.

  tokenizer: its address, "" if none is given.
  patches: tokens of an image, None if they are not known.
  left_out: why the sources of a name are not looked at.
  """

  entries: tuple[Entry, ...]
  tokenizer: str
  patches: int | None
  left_out: Mapping[str, str]


def is_config(text: str) -> bool:
  """Return whether an argument names a config, as configs/pivot.py:files."""
  return re.fullmatch(r".+\.py(:.*)?", text, re.DOTALL) is not None


def read(
  config: str,
  overrides: Sequence[str],
  *,
  max_length: int | None,
  max_bad: float | None,
) -> Wanted:
  """Return the sources of a config that have a path, each once.

  Args:
    overrides: of its values, as `--config.key=value`.
    max_length: instead of those of the stages that use a source.
    max_bad: instead of the sources' own.

  Raises:
    InputError: the config cannot be read, or names no files.
  """
  found = _load(config, overrides)
  if "sources" not in found:
    raise InputError(f"{config}: has no sources; give the files instead")
  encoder = check_encoder.read(found)
  stages = check_stages.read(config, found, side=encoder.image_size)
  entries: dict[str, Entry] = {}
  left_out = {}
  for name, spec in found.sources.to_dict().items():
    if not spec.get("path"):
      left_out[name] = (
        spec.get("given_by") or f"kind={spec['kind']!r} names no path"
      )
      continue
    users = [stage for stage in stages if name in stage.sources]
    entry = _entry(spec, users)
    if max_bad is not None:
      entry = entry._replace(max_bad=max_bad)
    if max_length is not None:
      entry = with_limit(entry, max_length)
    known = entries.get(entry.spec)
    entries[entry.spec] = _joined(known, entry) if known else entry
  kept = _without_texts(entries.values())
  if not kept:
    raise InputError(f"{config}: its sources name no files")
  return Wanted(kept, found.get("tokenizer", ""), encoder.patches, left_out)


def with_limit(entry: Entry, max_length: int) -> Entry:
  """Return an entry whose rows may have so many tokens; 0: any number."""
  readings = [one._replace(max_length=max_length) for one in entry.readings]
  return entry._replace(readings=tuple(dict.fromkeys(readings)))


def _entry(
  spec: Mapping[str, Any], users: Sequence[check_stages.Stage]
) -> Entry:
  """Return what to open for an entry of a config, and how it is read."""
  kept = {key: spec[key] for key in spec if key not in _USE}
  place = pathlib.Path(spec["path"]) / spec.get("split", "")
  frames = [stage.frame for stage in users if stage.frame]
  if spec.get("image_size") and spec["kind"] not in opener.TEXTS:
    # The source frames them, and a square is never refused.
    how = spec.get("resample", "bicubic")
    frames = [check_rows.Frame(spec["image_size"], how)]
  return Entry(
    path=str(place),
    images=spec.get("image_root") or None,
    readings=tuple(dict.fromkeys(stage.reading for stage in users)) or (ALONE,),
    frames=tuple(dict.fromkeys(frames)),
    max_pixels=spec.get("max_pixels", images.MAX_PIXELS),
    max_bad=spec.get("max_bad", 0.0),
    spec=json.dumps(kept, sort_keys=True),
  )


def _joined(one: Entry, other: Entry) -> Entry:
  """Return an entry that is read as both are."""
  return one._replace(
    readings=tuple(dict.fromkeys((*one.readings, *other.readings))),
    frames=tuple(dict.fromkeys((*one.frames, *other.frames))),
    max_bad=min(one.max_bad, other.max_bad),
  )


def _without_texts(entries) -> tuple[Entry, ...]:
  """Leave out files that are read without images and with them as well."""
  kinds = [(entry, json.loads(entry.spec)["kind"]) for entry in entries]
  whole = {entry.path for entry, kind in kinds if kind == "llava"}
  return tuple(
    entry
    for entry, kind in kinds
    if kind != "llava_text" or entry.path not in whole
  )


def _load(config: str, overrides: Sequence[str]) -> ConfigDict:
  """Run a config file and sets its values."""
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
  except _BROKEN as error:
    words = " ".join(f"{type(error).__name__}: {error}".split())
    raise InputError(f"{config}: {words}") from None
  if not isinstance(found, ConfigDict):
    raise InputError(f"{config}: its get_config returns no ConfigDict")
  return found
