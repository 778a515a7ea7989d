"""Reads from a config which files to check, and how its stages read them.

The config is planned as `main` plans it, but as if all its data were there, so
that a file can be checked before the others are at hand. A stage's coder is the
one that it trains with. Of weights, only the small files that describe them
are read, and nothing is fetched.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from pivot_jax import addresses, command_line, files, recipes
from pivot_jax.data import chat, coders, framing, images, opener
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.data.tools import check_rows
from pivot_jax.errors import InputError
from pivot_jax.models import vit
from pivot_jax.recipe import plan, preflight
from pivot_jax.recipe.inputs import Step
from pivot_jax.training import objectives
from pivot_jax.weights import checkpoint
from pivot_jax.weights.convert import hf_config

# The side of an image where the encoder's is not known.
_SIDE = 384
# Of an entry: how its rows are used, and not what they are.
_USE = ("given_by", "max_bad", "bad", "group", "image_size", "resample")


class Overrides(NamedTuple):
  """Options of the command line that win over the config; None: not set."""

  tokenizer: str | None = None
  patches: int | None = None
  max_length: int | None = None
  max_bad: float | None = None


class Stage(NamedTuple):
  """The sources that a stage reads, its coder, and its images if it sees any.

  known: whether the size of an image in tokens is the encoder's own.
  """

  sources: tuple[str, ...]
  coder: coders.Coder
  frame: check_rows.Frame | None
  known: bool


def read(
  config: str, values: Sequence[str], overrides: Overrides
) -> check_rows.Wanted:
  """Return the sources of a config that have a path, each once.

  Args:
    values: of the config, as `--config.key=value`.

  Raises:
    InputError: the config cannot be read, or names no files.
  """
  found = _load(config, values)
  if "sources" not in found:
    raise InputError(f"{config}: has no sources; give the files instead")
  address = overrides.tokenizer or found.get("tokenizer") or ""
  folder = addresses.tokenizer_folder(address or check_rows.TOKENIZER)
  tokenizer = load_tokenizer(folder)
  stages = _stages(config, found, tokenizer, overrides.patches)
  known = [stage.coder.patches for stage in stages if stage.known]
  patches = overrides.patches or next(iter(known), None)
  alone = coders.coder_of(
    check_rows.ALONE, tokenizer, patches=patches or check_rows.PATCHES
  )
  entries: dict[str, check_rows.Entry] = {}
  skipped = {}
  for name, spec in found.sources.to_dict().items():
    if not spec.get("path"):
      why = spec.get("given_by") or f"kind={spec['kind']!r} names no path"
      skipped[name] = why
      continue
    users = [stage for stage in stages if name in stage.sources]
    entry = _entry(spec, users, alone)
    if overrides.max_bad is not None:
      entry = entry._replace(max_bad=overrides.max_bad)
    if overrides.max_length is not None:
      entry = entry.limited(overrides.max_length)
    same = entries.get(entry.spec)
    entries[entry.spec] = _joined(same, entry) if same else entry
  kept = _without_texts(list(entries.values()))
  if not kept:
    raise InputError(f"{config}: its sources name no files, so none is checked")
  return check_rows.Wanted(kept, address, patches, skipped)


def encoder(step: Step, made: Mapping[str, Step]) -> vit.VisionConfig | None:
  """Return the encoder that a stage reads images with, None if not known.

  Args:
    made: the stages of the plan by their folders; an encoder that one of them
      hands on is followed to where it comes from.
  """
  address = step.inputs.get("vision") or step.inputs.get("init") or ""
  before = made.get(address.partition(":")[0])
  if before is not None:
    return encoder(before, made)
  if address:
    return _described(address)
  sizes = step.config.vision.to_dict()
  sizes.pop("init", None)
  return vit.VisionConfig(**sizes)


def _stages(
  config: str,
  found: ConfigDict,
  tokenizer: chat.Tokenizer,
  patches: int | None,
) -> list[Stage]:
  """Return the stages of a config that read data.

  Raises:
    InputError: a setting that no row could be read by.
  """
  stages = []
  try:
    steps = _steps(found)
    made = {str(step.folder): step for step in steps}
    for step in steps:
      if not step.config.get("data"):
        continue
      preflight.check_choices(step)
      stages.append(_stage(step, made, tokenizer, patches))
      blind = step.config.get("blind")
      if blind:
        # The baseline reads the texts, and the model never does.
        coder = check_rows.limited(stages[-1].coder, 0)
        stages.append(Stage((blind,), coder, None, stages[-1].known))
  except InputError as error:
    raise InputError(f"{config}: {error}") from None
  return stages


def _steps(found: ConfigDict) -> Sequence[Step]:
  """Return the stages that run once all data is there.

  Raises:
    InputError: a config that is no recipe.
  """
  whole = ConfigDict(found.copy_and_resolve_references().to_dict())
  for spec in whole.sources.values():
    # A stage whose source says how to fill it would be skipped without data.
    if "given_by" in spec:
      del spec["given_by"]
  try:
    # A report reads no rows, and the weights of its arms may be elsewhere.
    whole.order = tuple(
      name
      for name in whole.order
      if name not in whole or whole[name].kind != "report"
    )
    return plan.expand(whole, pathlib.Path("run")).steps
  except (AttributeError, KeyError) as error:
    raise InputError(_lacks(error)) from None


def _stage(
  step: Step,
  made: Mapping[str, Step],
  tokenizer: chat.Tokenizer,
  patches: int | None,
) -> Stage:
  section = step.config.to_dict()
  data = section["data"]
  names = (data,) if isinstance(data, str) else tuple(name for name, _ in data)
  specs = [section["sources"][name] for name in names]
  sees = "vision" in section.get("parts", checkpoint.PARTS)
  vision = encoder(step, made) if sees else None
  known = patches or (vision.num_patches if vision else None)
  coder = coders.coder_of(
    section,
    tokenizer,
    image_size=_side(section["resample"], vision),
    patches=known or check_rows.PATCHES,
    long=opener.long_rows(section.get("long", "error"), _there(specs)),
    pairs=_sees_pairs(step),
  )
  frame = check_rows.Frame(coder.image_size, coder.resample)
  try:
    # What is wrong with any image is no fault of one of them.
    framing.resize(
      np.zeros((1, 1, 3), np.uint8), frame.size, resample=frame.resample
    )
  except InputError as error:
    raise InputError(f"{step.name}: {error}") from None
  return Stage(names, coder, frame, known is not None)


def _sees_pairs(step: Step) -> bool:
  """Return whether a stage sees both answers of a pair, or the chosen alone."""
  name = step.config.get("objective")
  return not name or objectives.named(name, f"{step.name}.objective").pairs


def _there(specs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Return the entries whose data is there, as far as it is in files."""
  return [spec for spec in specs if spec.get("path", "scenes")]


def _side(resample: str, vision: vit.VisionConfig | None) -> int:
  if vision is not None:
    return vision.image_size
  return framing.parse_resample(resample).edge or _SIDE


def _described(address: str) -> vit.VisionConfig | None:
  """Return the encoder that small files beside its weights describe."""
  kind, _, rest = address.partition(":")
  if kind in ("bv", "timm"):
    return None
  if kind == "hf":
    folder = rest.partition("?")[0].partition(":")[0]
    # A model of the hub would be fetched.
    if not pathlib.Path(folder).expanduser().is_dir():
      return None
  where = addresses.parse(address)
  try:
    if where.kind != "hf":
      return checkpoint.configs(files.read_json(where.path / "model.json"))[0]
    found = hf_config.read(where.path).vision
  except (InputError, KeyError, TypeError, ValueError):
    # The report says that the number of tokens is a guess.
    return None
  names = {"image_size": "image_size", "tokens": "feature_tokens"}
  chosen = {
    field: where.options[option]
    for option, field in names.items()
    if option in where.options
  }
  return found and dataclasses.replace(found, **chosen)


def _entry(
  spec: Mapping[str, Any], users: Sequence[Stage], alone: coders.Coder
) -> check_rows.Entry:
  """Return the file to open for an entry of a config, and how it is read."""
  kept = {key: spec[key] for key in spec if key not in _USE}
  place = pathlib.Path(spec["path"]) / spec.get("split", "")
  frames = [stage.frame for stage in users if stage.frame]
  if spec.get("image_size") and spec["kind"] not in opener.TEXTS:
    # The source frames them, and a square is never refused.
    how = spec.get("resample", "bicubic")
    frames = [check_rows.Frame(spec["image_size"], how)]
  return check_rows.Entry(
    path=str(place),
    root=spec.get("image_root") or None,
    codings=tuple(dict.fromkeys(stage.coder for stage in users)) or (alone,),
    frames=tuple(dict.fromkeys(frames)),
    max_pixels=spec.get("max_pixels", images.MAX_PIXELS),
    max_bad=spec.get("max_bad", 0.0),
    spec=json.dumps(kept, sort_keys=True),
  )


def _joined(one: check_rows.Entry, other: check_rows.Entry) -> check_rows.Entry:
  """Return an entry that is read as both are."""
  return one._replace(
    codings=tuple(dict.fromkeys((*one.codings, *other.codings))),
    frames=tuple(dict.fromkeys((*one.frames, *other.frames))),
    max_bad=min(one.max_bad, other.max_bad),
  )


def _without_texts(
  entries: Sequence[check_rows.Entry],
) -> tuple[check_rows.Entry, ...]:
  """Skip files that are read without images and with them as well."""
  kinds = [(entry, json.loads(entry.spec)["kind"]) for entry in entries]
  whole = {entry.path for entry, kind in kinds if kind == "llava"}
  return tuple(
    entry
    for entry, kind in kinds
    if kind != "llava_text" or entry.path not in whole
  )


def _load(config: str, values: Sequence[str]) -> ConfigDict:
  """Run a config file and set its values."""
  argv = ["check", f"--config={config}", *values]
  defined = flags.FlagValues()
  recipes.define("The config.", flag_values=defined, argv=argv)
  command_line.read(argv, defined)
  found = defined["config"].value
  assert found is not None
  return found


def _lacks(error: Exception) -> str:
  """Return which value a config lacks, as its error says it."""
  # The words of a KeyError, quoted once or twice.
  words = " ".join(re.findall(r"[\w.]+", str(error).replace(r"\n", " ")))
  return f"has no value {words}"
