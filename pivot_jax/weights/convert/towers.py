"""The whole published vision tower behind what is computed of it.

An encoder here stops at the layer that is read. The published model has more:
the blocks behind it, the last norm, and by family a pooling head, a mask token
or a pooler. Such tensors are never computed; they are read to be given back.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from pivot_jax import errors, trees
from pivot_jax.models import mllm, vit
from pivot_jax.weights.convert import names


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
  return {name: arrays.get(name, given.get(name)) for name in order + rest}


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
  """The whole published encoder: every block and the final norm."""
  return dataclasses.replace(
    config, feature_layer=config.num_hidden_layers, final_norm=True
  )


@functools.lru_cache(maxsize=64)
def _tower(config: vit.VisionConfig) -> Any:
  model = mllm.MLLM(None, config)
  shapes = jax.eval_shape(lambda: mllm.init_params(model, jax.random.key(0)))
  return shapes["vision"]


def _inert(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A block of these adds zero twice: the identity."""
  is_norm = re.search(r"layer_?norm\d?\.weight$", name)
  return np.ones(shape, np.float32) if is_norm else np.zeros(shape, np.float32)
