"""timm's checkpoints of vision transformers, in and out.

The file is safetensors; `config.json` beside it, as timm's hub folders have it,
names the architecture and may give `model_args`. Without one the family shows
in the tensors. What timm computes that we leave out (a classifier) is named.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from pivot_jax import errors
from pivot_jax.convert import infer, layouts, source, tensors, towers
from pivot_jax.convert.processor import Processor
from pivot_jax.models import vit

_RULES = (
  (r"head\.(.+)", "classifier"),
  (r"fc_norm\.(.+)", "classifier"),
  (r"(?:visual\.trunk\.)?(.+)", "vision"),
)
_FILTERS = ("bicubic", "bilinear")


def open_file(
  path: Path, *, choices: Mapping[str, Any] | None = None
) -> source.Source:
  """Opens a safetensors file, or the folder that holds `model.safetensors`.

  Raises:
    InputError: a pickle, a damaged file, another architecture, or tensors that
      do not fit: all are listed.
  """
  if path.is_dir():
    path = path / "model.safetensors"
  if not path.exists():
    raise errors.InputError(f"{path}: no such file")
  stored = tensors.contents_of_file(path)
  found = source.Found(stored)
  for key in stored:
    found.add(key, _RULES)
  shapes = {
    name.removeprefix("vision."): found.shape(name)
    for name in found.keys
    if name.startswith("vision.")
  }
  beside = path.with_name("config.json")
  config = tensors.read_json(beside) if beside.exists() else {}
  arguments = config.get("model_args") or {}
  named = config.get("architecture") or path.stem
  vision = infer.vision(
    str(path),
    shapes,
    family=_family(shapes, named),
    layout="timm",
    named=named,
    heads=arguments.get("num_heads"),
  )
  known = _processor(beside, config, vision)
  if known is not None:
    choices = dict(image_mean=known.mean, image_std=known.std) | (choices or {})
  vision = vit.VisionConfig(**vars(vision) | dict(choices or {}))
  return source.from_tensors(
    str(path), "timm", found, vision=vision, layout="timm", processor=known
  )


def save(
  folder: Path,
  config: vit.VisionConfig,
  vision_params: PyTree,
  *,
  unread: Mapping[str, np.ndarray] | None = None,
  resample: str = "bicubic",
  dtype: str = "float32",
) -> None:
  """Writes `model.safetensors` and `config.json` as timm's hub folders have it.

  `timm.create_model(NAME, checkpoint_path="FOLDER/model.safetensors")` loads
  it, NAME being the architecture of config.json; sizes that were not published
  need its `model_args`, too. A SigLIP encoder whose pooling head is not in
  `unread` is timm's `_gap` variant, which has none.
  """
  arrays = towers.complete(config, vision_params, unread)
  arrays.pop("mask_token", None)
  for name in [n for n in arrays if n.startswith("pooler.")]:
    del arrays[name]
  pooled = any(name.startswith("head.") for name in arrays)
  tensors.write(folder, layouts.to_foreign("timm", arrays), dtype=dtype)
  tensors.write_json(
    folder / "config.json", _config_json(config, resample, pooled=pooled)
  )


def architecture(config: vit.VisionConfig, *, pooled: bool) -> str:
  """Returns timm's name of a published encoder, or that of its base model."""
  size = _NAMES.get((config.family, config.hidden_size))
  patch, side = config.patch_size, config.image_size
  if size is None:
    size, patch, side = "base", 16, 224
  if config.family == "siglip":
    return f"vit_{size}_patch{patch}_siglip{'' if pooled else '_gap'}_{side}"
  if config.family == "clip":
    return f"vit_{size}_patch{patch}_clip_quickgelu_{side}"
  if config.family == "dinov2":
    return f"vit_{'giant' if config.gated_mlp else size}_patch14_dinov2"
  return f"vit_{size}_patch{patch}_{side}"


_NAMES = {
  ("siglip", 768): "base",
  ("siglip", 1024): "large",
  ("siglip", 1152): "so400m",
  ("siglip", 1536): "giantopt",
  ("clip", 768): "base",
  ("clip", 1024): "large",
  ("dinov2", 384): "small",
  ("dinov2", 768): "base",
  ("dinov2", 1024): "large",
  ("dinov2", 1536): "giant",
  **{
    (family, width): size
    for family in ("vit", "vit_mae")
    for width, size in ((768, "base"), (1024, "large"), (1280, "huge"))
  },
}


def _family(shapes: Mapping[str, tuple[int, ...]], named: str) -> str:
  if "blocks.0.ls1.gamma" in shapes:
    return "dinov2"
  if "norm_pre.weight" in shapes:
    return "clip"
  if "cls_token" not in shapes:
    return "siglip"
  return "vit_mae" if "mae" in named else "vit"


def _processor(path, config, vision) -> Processor | None:
  given = config.get("pretrained_cfg")
  if not given:
    return None
  name = given.get("interpolation", "bicubic")
  if name not in _FILTERS:
    raise errors.InputError(
      f"{path}: interpolation is {name!r}; it can be {' or '.join(_FILTERS)}"
    )
  side = given.get("input_size", [3, vision.image_size])[-1]
  mode = given.get("crop_mode", "center")
  if mode not in ("center", "squash"):
    raise errors.InputError(f"{path}: crop_mode {mode!r} is not done here")
  edge = math.floor(side / given.get("crop_pct", 0.875))
  framing = name
  if mode == "center":
    framing = f"crop_{name}" if edge == side else f"crop_{name}:{edge}"
  elif edge != side:
    raise errors.InputError(
      f"{path}: crop_mode squash with crop_pct {given['crop_pct']} is not done"
      " here"
    )
  mean = tuple(given.get("mean", vision.image_mean))
  std = tuple(given.get("std", vision.image_std))
  return Processor(framing, side, mean, std)


def _config_json(config, resample, *, pooled) -> dict[str, Any]:
  filter_, _, edge = resample.removeprefix("crop_").partition(":")
  side = config.image_size
  return {
    "architecture": architecture(config, pooled=pooled),
    "num_classes": 0,
    "num_features": config.hidden_size,
    "pretrained_cfg": {
      "input_size": [3, side, side],
      "interpolation": filter_,
      # timm rounds down what it divides by this.
      "crop_pct": side / (int(edge) + 0.5) if edge else 1.0,
      "crop_mode": "center" if resample.startswith("crop_") else "squash",
      "mean": list(config.image_mean),
      "std": list(config.image_std),
      "num_classes": 0,
    },
    "model_args": _arguments(config, pooled=pooled),
  }


def _arguments(config: vit.VisionConfig, *, pooled: bool) -> dict[str, Any]:
  """What timm's VisionTransformer is told beside its defaults."""
  fc1 = config.intermediate_size * (2 if config.gated_mlp else 1)
  found: dict[str, Any] = dict(
    img_size=config.image_size,
    patch_size=config.patch_size,
    embed_dim=config.hidden_size,
    depth=config.num_hidden_layers,
    num_heads=config.num_attention_heads,
    # Half a unit more, since timm rounds the product down.
    mlp_ratio=(fc1 + 0.5) / config.hidden_size,
    num_classes=0,
  )
  if config.family == "siglip":
    # timm's own base and large have the exact GELU, which the model never had.
    found |= dict(act_layer="gelu_tanh", global_pool="map" if pooled else "avg")
  return found
