"""timm's checkpoints of vision transformers, in and out.

The file is safetensors; `config.json` beside it, as timm's hub folders have it,
names the architecture and may give `model_args`. Without one the name of the
file stands for it, and the family shows in the tensors; what neither tells is
asked for. What timm computes and we do not (a classifier) is named.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from pivot_jax import errors
from pivot_jax.models import bounds, vit
from pivot_jax.weights.convert import (
  layouts,
  open_weights,
  safetensor_files,
  towers,
)
from pivot_jax.weights.convert.processor import Processor

_RULES = (
  (r"head\.(.+)", "classifier"),
  (r"fc_norm\.(.+)", "classifier"),
  # open_clip's files of models whose image tower is timm's.
  (r"(text\..+|logit_scale|logit_bias)", "contrastive"),
  (r"(?:visual\.trunk\.)?(.+)", "vision"),
)
_FILTERS = ("bicubic", "bilinear")
# timm's names of activations.
_ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_tanh": "gelu_pytorch_tanh",
  "quick_gelu": "quick_gelu",
  "silu": "silu",
}
# timm's name of a size and, by patch, its image sizes, by family and width.
_PUBLISHED: Mapping[tuple[str, int], tuple[str, dict[int, tuple[int, ...]]]] = {
  ("siglip", 768): ("base", {16: (224, 256, 384, 512), 32: (256,)}),
  ("siglip", 1024): ("large", {16: (256, 384, 512)}),
  ("siglip", 1152): ("so400m", {14: (224, 378, 384), 16: (256, 384, 512)}),
  ("siglip", 1536): ("giantopt", {16: (256, 384)}),
  ("clip", 768): ("base", {16: (224,), 32: (224,)}),
  ("clip", 1024): ("large", {14: (224, 336)}),
  ("clip", 1280): ("huge", {14: (224, 378)}),
  ("dinov2", 384): ("small", {14: (518,)}),
  ("dinov2", 768): ("base", {14: (518,)}),
  ("dinov2", 1024): ("large", {14: (518,)}),
  ("dinov2", 1536): ("giant", {14: (518,)}),
  ("vit", 192): ("tiny", {16: (224, 384)}),
  ("vit", 384): ("small", {16: (224, 384), 32: (224, 384)}),
  ("vit", 768): ("base", {16: (224, 384), 8: (224,), 32: (224, 384)}),
  ("vit", 1024): ("large", {16: (224, 384), 14: (224,), 32: (224, 384)}),
  ("vit", 1280): ("huge", {14: (224,)}),
}


def open_file(
  path: Path, *, choices: Mapping[str, Any] | None = None
) -> open_weights.OpenWeights:
  """Open a safetensors file, or the folder that holds `model.safetensors`.

  Raises:
    InputError: a pickle, a damaged file, another architecture, or tensors that
      do not fit: all are listed.
  """
  if not path.exists():
    raise errors.InputError(f"{path}: no such file")
  whole = path.is_dir()
  stored = (
    safetensor_files.contents(path)
    if whole
    else safetensor_files.contents_of_file(path)
  )
  found = open_weights.Found(stored)
  for key in stored:
    found.add(key, _RULES)
  shapes = found.tower()
  beside = (path if whole else path.parent) / "config.json"
  config = safetensor_files.read_json(beside) if beside.exists() else {}
  arguments = bounds.section(f"{beside}: model_args", config.get("model_args"))
  unknown = sorted(arguments.keys() - _ARGUMENTS)
  if unknown:
    raise errors.InputError(
      f"{beside}: model_args has {', '.join(unknown)}, and what they change is"
      " not computed here"
    )
  about = bounds.section(
    f"{beside}: pretrained_cfg", config.get("pretrained_cfg")
  )
  named = config.get("architecture") or (path.name if whole else path.stem)
  named = f"{named}.{about.get('tag', '')}"
  family = _family(path, shapes, named)
  side, heads = _numbers(beside, arguments, about)
  vision = towers.from_shapes(
    str(path),
    shapes,
    family=family,
    layout="timm",
    # The last number that has the grid of patches counts.
    named=f"{named} {side}",
    heads=heads or _moco_heads(family, named, shapes),
  )
  fields: dict[str, Any] = {}
  activation = _activation(path, family, named, arguments)
  if activation and not vision.gated_mlp:
    fields["hidden_act"] = activation
  if family == "vit" and "moco" in named:
    fields["image_mean"], fields["image_std"] = towers.IMAGENET
  known = _processor(beside, config, vision)
  if known is not None:
    fields |= dict(image_mean=known.mean, image_std=known.std)
  vision = vit.VisionConfig(**vars(vision) | fields | dict(choices or {}))
  return open_weights.from_tensors(
    str(path), "timm", found, vision=vision, layout="timm", processor=known
  )


def _numbers(beside, arguments, about) -> tuple[int | str, int | None]:
  """Return what config.json says of the image size ("": nothing) and heads."""
  side, heads = arguments.get("img_size"), arguments.get("num_heads")
  if side is None:
    side = _side(beside, about)
  else:
    bounds.whole(f"{beside}: model_args.img_size", side, bounds.PIXELS)
  if heads is not None:
    bounds.whole(f"{beside}: model_args.num_heads", heads, bounds.WIDTH)
  return "" if side is None else side, heads


def _side(beside, about) -> int | None:
  """Return the side of the images by pretrained_cfg.input_size."""
  name, found = f"{beside}: pretrained_cfg.input_size", about.get("input_size")
  if found is None:
    return None
  if not isinstance(found, list) or not found:
    raise errors.InputError(
      f"{name} is {bounds.told(found)}; it must be [3, height, width]"
    )
  return bounds.whole(name, found[-1], bounds.PIXELS)


def save(
  folder: Path,
  config: vit.VisionConfig,
  vision_params: PyTree,
  *,
  unread: Mapping[str, np.ndarray] | None = None,
  resample: str = "bicubic",
  dtype: str = "float32",
) -> None:
  """Write `model.safetensors` and `config.json` as timm's hub folders have it.

  `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, and so does
  `timm.create_model(architecture, checkpoint_path=".../model.safetensors",
  **model_args)` with those of config.json. A SigLIP encoder whose pooling head
  is not in `unread` is timm's `_gap` variant, which has none.
  """
  arrays = towers.complete(config, vision_params, unread)
  arrays.pop("mask_token", None)
  for name in [n for n in arrays if n.startswith("pooler.")]:
    del arrays[name]
  pooled = any(name.startswith("head.") for name in arrays)
  safetensor_files.write(
    folder, layouts.to_foreign("timm", arrays), dtype=dtype
  )
  safetensor_files.write_json(
    folder / "config.json", _config_json(config, resample, pooled=pooled)
  )


def architecture(config: vit.VisionConfig, *, pooled: bool) -> str:
  """Return timm's name of a published encoder, or of the closest to it.

  `model_args` of config.json makes that one of the encoder's own size.
  """
  kind = "vit" if config.family == "vit_mae" else config.family
  fallback = _PUBLISHED[kind, 768]
  size, patches = _PUBLISHED.get((kind, config.hidden_size), fallback)
  if config.patch_size not in patches:
    size, patches = fallback
  patch = config.patch_size if config.patch_size in patches else [*patches][0]
  sides = patches[patch]
  side = config.image_size if config.image_size in sides else sides[0]
  if kind == "siglip":
    return f"vit_{size}_patch{patch}_siglip{'' if pooled else '_gap'}_{side}"
  if kind == "clip":
    quick = "_quickgelu" if config.hidden_act == "quick_gelu" else ""
    return f"vit_{size}_patch{patch}_clip{quick}_{side}"
  if kind == "dinov2":
    return f"vit_{'giant' if config.gated_mlp else size}_patch{patch}_dinov2"
  return f"vit_{size}_patch{patch}_{side}"


# Of timm's VisionTransformer; what they say shows in the tensors, is checked, or
# is of the classifier.
_ARGUMENTS = {
  *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"),
  *("num_classes", "class_token", "global_pool", "act_layer", "init_values"),
  *("pre_norm", "fc_norm", "dynamic_img_size"),
}


def _moco_heads(family, named, shapes) -> int | None:
  """MoCo-v3's small ViT has twice the heads of others of its width."""
  small = shapes.get("cls_token", (0,))[-1] == 384
  return 12 if family == "vit" and "moco" in named and small else None


def _family(
  path: Path, shapes: Mapping[str, tuple[int, ...]], named: str
) -> str:
  if "blocks.0.ls1.gamma" in shapes:
    return "dinov2"
  if "norm_pre.weight" in shapes:
    return "clip"
  if "cls_token" in shapes:
    return "vit_mae" if re.search(r"(?<![a-z])mae(?![a-z])", named) else "vit"
  if "siglip" not in named and "attn_pool.latent" not in shapes:
    # I-JEPA, say, has these tensors, too, and another activation.
    raise errors.InputError(
      f"{path}: an encoder without class token and pooling may be SigLIP or"
      " another; give config.json beside it, with"
      ' {"architecture": "vit_..._siglip_gap_..."} if it is'
    )
  return "siglip"


# Weights that were trained with QuickGELU, as timm notes of them under names that
# have the exact GELU.
_QUICK = re.compile(
  r"\.(openai|dfn\w*|metaclip\w*)$|patch32_clip_224\.laion400m_e32$"
)


def _activation(path, family, named, arguments) -> str | None:
  """Return what the names tell of the activation, None for the family's."""
  given = arguments.get("act_layer")
  if given is not None:
    return _ACTIVATIONS[bounds.word(f"{path}: act_layer", given, _ACTIVATIONS)]
  if family != "clip":
    return None
  match = re.search(r"vit_\w+_clip_(quickgelu_)?\d", named)
  if match is None:
    raise errors.InputError(
      f"{path}: which GELU this CLIP encoder has cannot be told from its"
      " tensors; give config.json beside it, with"
      ' {"architecture": "vit_..._clip_quickgelu_..."} or without quickgelu'
    )
  quick = match[1] or _QUICK.search(named)
  return "quick_gelu" if quick else "gelu"


def _processor(path, config, vision) -> Processor | None:
  given = config.get("pretrained_cfg")
  if not given:
    return None
  where = f"{path}: pretrained_cfg."
  name = bounds.word(
    f"{where}interpolation", given.get("interpolation", "bicubic"), _FILTERS
  )
  side = _side(path, given) or vision.image_size
  mode = given.get("crop_mode", "center")
  bounds.word(f"{where}crop_mode", mode, ("center", "squash"))
  part = bounds.real(
    f"{where}crop_pct", given.get("crop_pct", 0.875), 1e-3, 1e3
  )
  edge = math.floor(side / part)
  framing = name
  if mode == "center":
    framing = f"crop_{name}" if edge == side else f"crop_{name}:{edge}"
  elif edge != side:
    raise errors.InputError(
      f"{path}: crop_mode squash with crop_pct {part} is not done here"
    )
  mean = bounds.mean(f"{where}mean", given.get("mean", vision.image_mean))
  std = bounds.std(f"{where}std", given.get("std", vision.image_std))
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
      # Nothing else in the files tells that it is no supervised ViT.
      **({"tag": "mae"} if config.family == "vit_mae" else {}),
    },
    "model_args": _arguments(config, pooled=pooled),
  }


def _arguments(config: vit.VisionConfig, *, pooled: bool) -> dict[str, Any]:
  """Return the arguments of timm's VisionTransformer beside its defaults."""
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
  if not config.gated_mlp:
    # timm's own SigLIP base and large have the exact GELU, which the published
    # models never had.
    found["act_layer"] = {ours: name for name, ours in _ACTIVATIONS.items()}[
      config.hidden_act
    ]
  if config.family == "siglip":
    found["global_pool"] = "map" if pooled else "avg"
  return found
