"""Vision towers as they are published: families, sizes, and the whole tower.

The choices that all models of a family share stand here, whoever wrote the
file, and so does the configuration of a tower that only its tensors tell.

An encoder here stops at the layer that is read. The published model has more:
the blocks behind it, the last norm, and by family a pooling head, a mask token
or a pooler. Such tensors are never computed; they are read to be given back.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from pivot_jax import errors, trees
from pivot_jax.models import mllm, vit
from pivot_jax.weights.convert import layouts, names

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = (
  (0.48145466, 0.4578275, 0.40821073),
  (0.26862954, 0.26130258, 0.27577711),
)
# The paper reads these after the last block and its norm (paper.md 1.4).
_LAST = dict(class_token=True, feature_layer=-1, final_norm=True)


def _family(statistics, **choices: Any) -> dict[str, Any]:
  mean, std = statistics
  return dict(image_mean=mean, image_std=std, **choices)


# Fields of VisionConfig. The statistics are those of images where no file says;
# the epsilon of a ViT is timm's, Hugging Face's files have their own.
CHOICES: Mapping[str, Mapping[str, Any]] = {
  "siglip": _family(_HALF, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
  "clip": _family(
    _CLIP,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    class_token=True,
    patch_bias=False,
    pre_norm=True,
  ),
  "dinov2": _family(
    IMAGENET,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    layer_scale=True,
    **_LAST,
  ),
  "vit": _family(_HALF, hidden_act="gelu", layer_norm_eps=1e-6, **_LAST),
  "vit_mae": _family(IMAGENET, hidden_act="gelu", layer_norm_eps=1e-6, **_LAST),
}
# Blocks of the published SigLIP encoders, by width.
SIGLIP_DEPTHS: Mapping[int, int] = {768: 12, 1024: 24, 1152: 27, 1536: 40}
# Attention heads of the published encoders, by family and width.
HEADS: Mapping[str, Mapping[int, int]] = {
  "siglip": {768: 12, 1024: 16, 1152: 16, 1536: 16},
  "clip": {768: 12, 1024: 16, 1280: 16},
  "dinov2": {384: 6, 768: 12, 1024: 16, 1536: 24},
  "vit": {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16},
  "vit_mae": {768: 12, 1024: 16, 1280: 16},
}


def from_shapes(
  where: str,
  shapes: Mapping[str, tuple[int, ...]],
  *,
  family: str,
  layout: str,
  named: str = "",
  heads: int | None = None,
  cut: bool = False,
) -> vit.VisionConfig:
  """Return the configuration of the tower that has these shapes.

  Args:
    where: the file, for messages.
    shapes: {name: shape} of the tower in `layout`.
    named: a name that may end in the image size ("siglip2-so400m-patch16-384"),
      for patches that do not divide it: the grid alone tells a multiple.
    heads: where the caller knows them.
    cut: a SigLIP tower may be without its last block, as the paper's code saves
      it; the published depth tells.

  Raises:
    InputError: a tensor that every tower has is missing, or the number of heads
      is not known.
  """
  tower = _Stored(where, shapes, family, layout)
  width, patch = tower.patches()
  choices = CHOICES[family]
  table = tower.shape("embeddings.position_embedding.weight")
  positions = table[0] - choices.get("class_token", False)
  grid = math.isqrt(max(0, positions))
  if grid**2 != positions or not grid:
    raise errors.InputError(
      f"{where}: {positions} positions are no square grid of patches"
    )
  gated = family == "dinov2" and tower.is_gated()
  inner = f"encoder.layers.0.mlp.{'gate_proj' if gated else 'fc1'}.weight"
  depth = tower.depth()
  try:
    return vit.VisionConfig(
      image_size=image_size(named, grid, patch),
      patch_size=patch,
      hidden_size=width,
      intermediate_size=tower.shape(inner)[0],
      num_hidden_layers=_published_depth(where, width, depth) if cut else depth,
      num_attention_heads=heads or _heads(where, family, width),
      family=family,
      gated_mlp=gated,
      **choices,
    )
  except errors.InputError as error:
    named_already = str(error).startswith(where)
    raise errors.InputError(
      f"{error}" if named_already else f"{where}: {error}"
    ) from error


class _Stored(NamedTuple):
  """The shapes of a file's tower, asked for by our names."""

  where: str
  shapes: Mapping[str, tuple[int, ...]]
  family: str
  layout: str

  def place(self, name: str) -> layouts.Place:
    at = layouts.place(self.layout, name)
    if at is None:
      raise self._absent(name)
    return at

  def _absent(self, name: str) -> errors.InputError:
    return errors.InputError(
      f"{self.where}: has no tensor {name}, so it is no {self.family} encoder"
      " in this layout"
    )

  def shape(self, name: str) -> tuple[int, ...]:
    at = self.place(name)
    if at.name not in self.shapes:
      raise self._absent(at.name)
    found = self.shapes[at.name][at.lead :]
    if not found:
      raise errors.InputError(
        f"{self.where}: {at.name} is {self.shapes[at.name]}, which has too few axes"
      )
    return (found[0] // at.blocks, *found[1:])

  def patches(self) -> tuple[int, int]:
    """Return the width and the side of a patch."""
    found = self.shape("embeddings.patch_embedding.weight")
    if len(found) != 4 or found[2] != found[3] or not found[2]:
      raise errors.InputError(
        f"{self.where}: the patch embedding is {found}; a fixed-resolution"
        " encoder has [width, 3, patch, patch] (SigLIP2 NaFlex is not read)"
      )
    return found[0], found[2]

  def is_gated(self) -> bool:
    """Return whether the MLP is gated.

    In timm's layout both kinds of MLP are called fc1 and fc2.
    """
    gate, fc1, fc2 = (
      self.place(f"encoder.layers.0.mlp.{name}.weight")
      for name in ("gate_proj", "fc1", "fc2")
    )
    if gate.name not in self.shapes:
      return False
    if gate.name != fc1.name:
      return True
    stored = self.shapes[gate.name], self.shapes.get(fc2.name, ())
    if not stored[0] or len(stored[1]) < 2:
      raise self._absent(fc2.name)
    return stored[0][0] == 2 * stored[1][1]

  def depth(self) -> int:
    first = self.place("encoder.layers.0.layer_norm1.weight")
    pattern = re.escape(first.name).replace("0", r"(\d{1,9})", 1)
    found = [re.fullmatch(pattern, name) for name in self.shapes]
    return max((int(match[1]) for match in found if match), default=-1) + 1


def _published_depth(where: str, width: int, stored: int) -> int:
  depth = SIGLIP_DEPTHS.get(width, stored)
  if stored not in (depth - 1, depth):
    raise errors.InputError(
      f"{where}: {stored} blocks of width {width} are no SigLIP tower, which has"
      f" {depth} (or {depth - 1} where the last is cut off)"
    )
  return depth


def _heads(where: str, family: str, width: int) -> int:
  if width not in HEADS[family]:
    raise errors.InputError(
      f"{where}: how many attention heads a {family} encoder of width {width}"
      " has cannot be told from its tensors; give config.json beside it, with"
      ' {"model_args": {"num_heads": N}}'
    )
  return HEADS[family][width]


def image_size(named: str, grid: int, patch: int) -> int:
  """Return the last number in a name that has this grid of patches.

  Without one, the grid times the patch: 378 and not 384 for 27 patches of 14,
  of which SigLIP's names say 384.
  """
  numbers = [int(n) for n in re.findall(r"(?<!\d)\d{1,9}(?!\d)", named)]
  fits = [n for n in numbers if n // patch == grid and n >= patch]
  return fits[-1] if fits else grid * patch


def unread(config: vit.VisionConfig) -> dict[str, tuple[int, ...]]:
  """Return {name: shape} of what lies behind the layer that is read."""
  inside = names.slots(_tower(config))
  whole = names.slots(_tower(_full(config)))
  return {
    name: slot.shape for name, slot in whole.items() if name not in inside
  }


@functools.lru_cache(maxsize=64)
def extras(config: vit.VisionConfig) -> dict[str, tuple[int, ...]]:
  """Return {name: shape} of tensors that only some files of a family have."""
  width, inner = config.hidden_size, config.intermediate_size
  if config.family == "dinov2":
    return {"mask_token": (1, width)}
  if config.family == "vit":
    return {
      "pooler.dense.weight": (width, width),
      "pooler.dense.bias": (width,),
    }
  if config.family != "siglip":
    return {}
  shapes: dict[str, tuple[int, ...]] = {"head.probe": (1, 1, width)}
  for name, rows, columns in (
    *((f"attention.{x}_proj", width, width) for x in ("q", "k", "v", "out")),
    ("mlp.fc1", inner, width),
    ("mlp.fc2", width, inner),
  ):
    shapes[f"head.{name}.weight"] = (rows, columns)
    shapes[f"head.{name}.bias"] = (rows,)
  shapes["head.layernorm.weight"] = shapes["head.layernorm.bias"] = (width,)
  return shapes


def whole(config: vit.VisionConfig) -> dict[str, tuple[int, ...]]:
  """Return {path: shape} of the published tower's leaves, all blocks stacked."""
  return {
    path: leaf.shape
    for path, leaf in trees.flatten(_tower(_full(config))).items()
  }


def extra_leaves(config: vit.VisionConfig) -> dict[str, tuple[int, ...]]:
  """Return {path: shape} of `extras` as leaves, as `as_tree` has them."""
  found = {}
  for name, shape in extras(config).items():
    path = _extra_path(name)
    found[path] = shape[::-1] if path.endswith("/kernel") else shape
  return found


def complete(
  config: vit.VisionConfig,
  params: trees.Params,
  given: Mapping[str, np.ndarray] | None,
) -> dict[str, np.ndarray]:
  """Return all tensors of the published tower, by our names.

  `given` holds those that are not in `params`, extras or not; without it the
  blocks behind the features do nothing (zero weights, unit norms) and there are
  no extras.

  Raises:
    InputError: `given` does not fit; all that is wrong is listed.
  """
  arrays = names.to_foreign(params)
  wanted, optional = unread(config), extras(config)
  if given is None:
    given = {name: _inert(name, shape) for name, shape in wanted.items()}
  wrong = [
    f"{name} {given[name].shape if name in given else 'absent'} for {shape}"
    for name, shape in wanted.items()
    if name not in given or given[name].shape != shape
  ]
  wrong += [
    f"{name} not wanted"
    for name, array in given.items()
    if name not in wanted and optional.get(name) != array.shape
  ]
  if wrong:
    raise errors.InputError(
      f"the tensors that are not computed do not fit: {', '.join(wrong)}"
    )
  order = list(names.slots(_tower(_full(config))))
  rest = [name for name in given if name in optional]
  whole = {**given, **arrays}
  return {name: whole[name] for name in order + rest}


def as_tree(arrays: Mapping[str, np.ndarray], config: vit.VisionConfig) -> Any:
  """Return the tree of `complete`'s tensors, all blocks stacked.

  Extras come in their own modules: `head/attention/q_proj/kernel`.
  """
  tree = names.from_foreign(
    _tower(_full(config)), lambda group: {n: arrays[n] for n in group}
  )
  flat = trees.flatten(tree)
  for name in extras(config):
    if name not in arrays:
      continue
    path = _extra_path(name)
    array = arrays[name]
    flat[path] = array.T if path.endswith("/kernel") else array
  return trees.unflatten(flat)


def _extra_path(name: str) -> str:
  *module, leaf = name.split(".")
  if leaf == "weight":
    leaf = "scale" if module[-1] == "layernorm" else "kernel"
  return "/".join([*module, leaf])


def _full(config: vit.VisionConfig) -> vit.VisionConfig:
  """Return the whole published encoder: every block and the final norm."""
  return dataclasses.replace(
    config, feature_layer=config.num_hidden_layers, final_norm=True
  )


@functools.lru_cache(maxsize=64)
def _tower(config: vit.VisionConfig) -> Any:
  model = mllm.MLLM(None, config)
  shapes = jax.eval_shape(lambda: mllm.init_params(model, jax.random.key(0)))
  return shapes["vision"]


def _inert(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Return weights with which a block adds zero twice: the identity."""
  is_norm = re.search(r"layer_?norm\d?\.weight$", name)
  return np.ones(shape, np.float32) if is_norm else np.zeros(shape, np.float32)
