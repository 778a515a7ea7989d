"""Weights that are opened and checked, and read one leaf at a time.

Every format ends in `OpenWeights`. Every tensor of a file is either a parameter,
or listed in `not_carried` with the reason why not, or an error; nothing is read
before all of them fit.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from pivot_jax import errors, trees
from pivot_jax.models import mllm, qwen2, vit
from pivot_jax.weights.convert import layouts, names, safetensor_files, towers
from pivot_jax.weights.convert.processor import Processor

# Tensors that are not carried, with the reason; the rest are the blocks and
# the norm behind the layer that is read, and what `towers.extras` names.
_NOT_CARRIED = (
  (r"contrastive\..+", "text half of the contrastive model"),
  (r"vision\.embeddings\.position_ids", "a constant"),
  (r"llm\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "a constant"),
  (r"decoder\..+", "decoder of the masked autoencoder"),
  (r"classifier\..+", "classification head"),
  (r"newline\..+", "separates tiles of an image, and there is one tile"),
)
_UNREAD = "behind the layer that is read"
_EXTRA = "not computed"
_TIED = "equals embed_tokens, to which it is tied"
Shape = tuple[int, ...]
_LISTED = 100  # of the tensors of a kind that do not fit


@dataclasses.dataclass(frozen=True)
class OpenWeights:
  """Weights that fit their models, of which no leaf is read yet.

  where: the folder or file. kind: its model_type or format.
  shapes: {path: shape} of the parameters, `vision/…`, `projector/…`, `llm/…`.
  read: (path, dtype) to one leaf in host memory, stacked and cast.
  read_unread: the tensors of the vision tower that are not computed with, by
    our names: what lies behind the layer that is read, and extras. float32.
  not_carried: [{"name", "reason"}, ...] as the file names them.
  processor: how the publisher brings images to the encoder, None if not said.
  """

  where: str
  kind: str
  vision: vit.VisionConfig | None
  llm: qwen2.LLMConfig | None
  shapes: Mapping[str, Shape]
  read: Callable[[str, Any], np.ndarray]
  read_unread: Callable[[], dict[str, np.ndarray]]
  not_carried: tuple[dict[str, str], ...]
  processor: Processor | None = None

  def params(self, dtype: DTypeLike = np.float32) -> Any:
    """Return the whole tree in host memory."""
    return trees.unflatten(
      {path: self.read(path, dtype) for path in self.shapes}
    )


def shapes_of(
  vision: vit.VisionConfig | None, llm: qwen2.LLMConfig | None
) -> Any:
  """Return the tree of shapes of a model's parameters."""
  model = mllm.MLLM(llm, vision)
  return jax.eval_shape(lambda: mllm.init_params(model, jax.random.key(0)))


class Found:
  """The tensors of a file by part and by their name within the part.

  `add` takes what a prefix rule made of a key; a key that no rule fits, or that
  names a tensor a second time, is `unexpected`.
  """

  def __init__(self, stored: Mapping[str, safetensor_files.Stored]):
    self.stored = stored
    self.keys: dict[str, str] = {}
    self.unexpected: list[str] = []

  def add(self, key: str, rules: tuple[tuple[str, str], ...]) -> None:
    for pattern, part in rules:
      match = re.fullmatch(pattern, key)
      if match:
        name = f"{part}.{match[1]}"
        if name in self.keys:
          break
        self.keys[name] = key
        return
    self.unexpected.append(f"{key} {self.stored[key].shape}")

  def shape(self, name: str) -> tuple[int, ...]:
    return self.stored[self.keys[name]].shape

  def tower(self) -> dict[str, Shape]:
    """Return {name: shape} of the vision tower, as the file names them."""
    return {
      name.removeprefix("vision."): self.shape(name)
      for name in self.keys
      if name.startswith("vision.")
    }


def from_tensors(
  where: str,
  kind: str,
  found: Found,
  *,
  vision: vit.VisionConfig | None,
  llm: qwen2.LLMConfig | None = None,
  layout: str = "siglip",
  cut: bool = False,
  processor: Processor | None = None,
) -> OpenWeights:
  """Check the tensors of a file against the models and return the weights.

  `cut` allows a tower whose blocks behind the features are not in the file.

  Raises:
    InputError: tensors missing, unexpected or misshapen: all are listed, and
      the reason where it can be told.
  """
  shapes = shapes_of(vision, llm)
  place = functools.partial(_place, where, layout)
  slots = {name: slot.shape for name, slot in names.slots(shapes).items()}
  behind = _behind(vision, found, layout, place, cut=cut)
  reasons = _reasons(found, slots, behind, place, llm)
  _check(where, found, slots | behind, place, reasons, vision)
  _check_tied(where, found, reasons)

  def fill(name: str, view: np.ndarray) -> None:
    at = place(name)
    key = found.keys[at.name]
    span = dict(block=at.block, blocks=at.blocks, lead=at.lead)
    safetensor_files.fill(view, found.stored[key], key, **span)

  flat = {path: leaf.shape for path, leaf in trees.flatten(shapes).items()}

  def read(path: str, dtype: DTypeLike) -> np.ndarray:
    return names.build_leaf(tuple(path.split("/")), flat[path], dtype, fill)

  def read_unread() -> dict[str, np.ndarray]:
    arrays = {
      name: np.empty(shape, np.float32) for name, shape in behind.items()
    }
    for name, array in arrays.items():
      fill(name, array)
    return {name.removeprefix("vision."): x for name, x in arrays.items()}

  return OpenWeights(
    where=where,
    kind=kind,
    vision=vision,
    llm=llm,
    shapes=flat,
    read=read,
    read_unread=read_unread,
    not_carried=tuple(
      {"name": found.keys[name], "reason": reason}
      for name, reason in sorted(reasons.items())
    ),
    processor=processor,
  )


def check(
  where: str,
  *,
  missing: Mapping[str, Shape],
  unexpected: Sequence[str],
  misshapen: Sequence[tuple[str, Shape, Shape]],
  vision: vit.VisionConfig | None,
  not_floats: Sequence[str] = (),
) -> None:
  """Raise InputError if anything is missing, unexpected or misshapen.

  Args:
    where: the file or folder.
    missing: {name: shape} of tensors that are not there.
    unexpected: "name shape" of tensors that have no place.
    misshapen: (name, shape found, shape wanted).
    vision: the encoder that is wanted, if one is.
    not_floats: "name type" of tensors that are stored as something else.
  """
  problems = {
    "missing": [f"{name} {shape}" for name, shape in missing.items()],
    "unexpected": list(unexpected),
    "misshapen": [f"{name} {has} for {want}" for name, has, want in misshapen],
    "not stored as floats": list(not_floats),
  }
  found = [f"{kind}: {_listed(p)}" for kind, p in problems.items() if p]
  if not found:
    return
  reason = _reason(missing, unexpected, misshapen, vision)
  if not_floats:
    reason = "this looks quantised: give the unquantised weights"
  # A reason comes before what may be a long list, general advice after it.
  advice = "; give weights and config.json of the same model, complete"
  raise errors.InputError(
    f"{where}: the tensors do not fit the model{f': {reason}' if reason else ''};"
    f" {'; '.join(found)}{'' if reason else advice}"
  )


def _listed(names: Sequence[str]) -> str:
  more = len(names) - _LISTED
  rest = f" and {more} more" if more > 0 else ""
  return f"{', '.join(names[:_LISTED])}{rest}"


def _place(where: str, layout: str, name: str) -> layouts.Place:
  """Return the place of a tensor of ours: its part, then its name."""
  part, _, rest = name.partition(".")
  if part != "vision":
    return layouts.Place(name)
  at = layouts.place(layout, rest)
  if at is None:
    raise errors.InputError(f"{where}: {layout} files have no {rest}")
  return at._replace(name=f"vision.{at.name}")


def _check(where, found, wanted, place, reasons, vision) -> None:
  """Raise InputError unless the file has what is wanted and nothing else."""
  expected = {
    place(name).name: place(name).shape(shape) for name, shape in wanted.items()
  }
  present = {n: s for n, s in expected.items() if n in found.keys}
  rest = [n for n in found.keys if n not in expected and n not in reasons]
  check(
    where,
    missing={n: s for n, s in expected.items() if n not in present},
    unexpected=[
      *found.unexpected,
      *(f"{found.keys[name]} {found.shape(name)}" for name in rest),
    ],
    misshapen=[
      (found.keys[name], found.shape(name), shape)
      for name, shape in present.items()
      if found.shape(name) != shape
    ],
    vision=vision,
    not_floats=safetensor_files.not_floats(
      {found.keys[n]: found.stored[found.keys[n]] for n in present}
    ),
  )


def _behind(vision, found, layout, place, *, cut):
  """Return {name: shape} of the tensors that are read only to be given back.

  Those of a family's extras count if the file has any of them.
  """
  if vision is None:
    return {}
  wanted = {f"vision.{n}": s for n, s in towers.unread(vision).items()}
  if cut:
    wanted = {n: s for n, s in wanted.items() if place(n).name in found.keys}
  extras = {
    f"vision.{name}": shape
    for name, shape in towers.extras(vision).items()
    if layouts.place(layout, name)
  }
  present = any(place(name).name in found.keys for name in extras)
  return wanted | (extras if present else {})


def _reasons(found, slots, behind, place, llm) -> dict[str, str]:
  """Return why each tensor is no parameter, by its name in `found`."""
  used = {place(name).name for name in slots}
  reasons = {
    place(name).name: _EXTRA if _is_extra(name) else _UNREAD
    for name in behind
    if place(name).name not in used
  }
  for name in found.keys:
    if name == "llm.lm_head.weight" and llm and llm.tie_word_embeddings:
      reasons[name] = _TIED
    for pattern, reason in _NOT_CARRIED:
      if re.fullmatch(pattern, name):
        reasons[name] = reason
  return {name: why for name, why in reasons.items() if name in found.keys}


def _is_extra(name: str) -> bool:
  return name.split(".")[1] in ("head", "mask_token", "pooler")


def _check_tied(where, found, reasons) -> None:
  head, table = "llm.lm_head.weight", "llm.embed_tokens.weight"
  if reasons.get(head) != _TIED:
    return
  keys = [found.keys[name] for name in (head, table)]
  if not safetensor_files.equal(found.stored, *keys):
    raise errors.InputError(
      f"{where}: lm_head.weight differs from embed_tokens.weight, but"
      " config.json sets tie_word_embeddings; set it to false"
    )


def _reason(missing, unexpected, misshapen, vision) -> str:
  """Say what the file looks like, or nothing."""
  text = " ".join(unexpected)
  if re.search(r"lora_[AB]\b|lora_[AB]\.", text):
    return "this looks like a LoRA adapter: merge it into its base model first"
  if re.search(r"qweight|qzeros|weight_scale|\.SCB|absmax", text):
    return "this looks quantised: give the unquantised weights"
  if re.search(r"register_tokens|reg_token", text):
    return "this looks like a DINOv2 with registers, which is not computed here"
  for name, has, want in misshapen:
    if "patch_embed" in name and len(has) == 2 and len(want) == 4:
      return (
        "this looks like SigLIP2 NaFlex, which reads patches of images of any"
        " shape: take a fixed-resolution one"
      )
  if vision is not None:
    return _tower_reason(missing, unexpected, misshapen, vision)
  return ""


def _tower_reason(missing, unexpected, misshapen, vision) -> str:
  number = r"vision\.(?:encoder\.layers?|blocks)\.(\d+)\."
  lost = {int(m[1]) for n in missing if (m := re.match(number, n))}
  whole = not unexpected and not misshapen
  if lost and whole and min(lost) + len(lost) == vision.num_hidden_layers:
    return (
      f"this looks like a tower cut to {min(lost)} of {vision.num_hidden_layers}"
      " layers: take it from the whole model, or write the number it has into"
      " num_hidden_layers and read its last one with ?feature_layer=-1"
    )
  for name, has, _ in misshapen:
    if re.search("pos(ition)?_embed", name) and len(has) > 1:
      rows = max(0, has[-2] - vision.class_token)
      side = math.isqrt(rows)
      return (
        f"its positions are for {side} x {side} patches, images of"
        f" {side * vision.patch_size} pixels: correct image_size in its config,"
        f" and ask for the other size with ?image_size="
        f"{vision.image_size}&positions=big_vision (or dinov2)"
      )
  return ""
