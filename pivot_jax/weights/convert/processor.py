"""preprocessor_config.json: how a publisher brings images to an encoder.

Read into the words of `pivot_jax.data.framing`, and written again. What the
pixels would change by and is not done here is refused by name. Models and their
config.json are not known here (`hf_config.py`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pivot_jax import errors
from pivot_jax.data import framing
from pivot_jax.models import bounds
from pivot_jax.weights.convert import safetensor_files

_FILTERS = {3: "bicubic", 2: "bilinear", 1: "lanczos"}  # Pillow's numbers
_SQUASH = {
  "resample": 3,
  "size": {"height": 224, "width": 224},
  "do_center_crop": False,
  "default_to_square": False,
  "image_mean": [0.5, 0.5, 0.5],
  "image_std": [0.5, 0.5, 0.5],
}
_CROP = {
  "resample": 3,
  "size": {"shortest_edge": 224},
  "do_center_crop": True,
  "crop_size": {"height": 224, "width": 224},
  "default_to_square": False,
  "image_mean": [0.48145466, 0.4578275, 0.40821073],
  "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# What transformers' classes do where the file is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "SiglipImageProcessor": _SQUASH,
  "CLIPImageProcessor": _CROP,
  "BitImageProcessor": _CROP,
  "ViTImageProcessor": _SQUASH | {"resample": 2, "default_to_square": True},
}
_ALWAYS = {
  "do_resize": True,
  "do_rescale": True,
  "rescale_factor": 1 / 255,
  "do_normalize": True,
  "crop_size": None,
}
_KNOWN_STEPS = {*_ALWAYS, "do_center_crop", "do_convert_rgb"}
# The class that squashes and the class that crops, for a kind of encoder.
_CLASSES = {
  "siglip": ("SiglipImageProcessor", "CLIPImageProcessor"),
  "clip": ("SiglipImageProcessor", "CLIPImageProcessor"),
  "dinov2": ("ViTImageProcessor", "BitImageProcessor"),
  "vit": ("ViTImageProcessor", "CLIPImageProcessor"),
  "vit_mae": ("ViTImageProcessor", "CLIPImageProcessor"),
}


class Processor(NamedTuple):
  """The way of images to an encoder: framed to `size` pixels, then normalised.

  Pixels in 0..1 have `mean` subtracted and are divided by `std`, by channel.
  """

  resample: str
  size: int
  mean: tuple[float, ...]
  std: tuple[float, ...]


def read(folder: Path, kind: str = "") -> Processor | None:
  """Read the image processor of a folder, None if it has none.

  As in transformers, the `image_processor` of processor_config.json comes
  before preprocessor_config.json, and a key that is absent or null has the
  default of its class. A file that names no class is one that crops (CLIP) or
  squashes (SigLIP) by its other keys; for `kind` vit and vit_mae it is ViT's,
  which resizes bilinearly. A processor of transformers' "Fast" kind
  resizes by torchvision, so that pixels may differ from ours by rounding.

  Raises:
    InputError: an unknown class, or a step or value that is not done here.
  """
  found = _find(folder)
  if found is None:
    return None
  where, given = found
  said = {name: value for name, value in given.items() if value is not None}
  fields = _ALWAYS | _defaults(where, said, kind) | said
  _check_steps(where, fields)
  resample, size = _framing(where, fields)
  if not fields["do_normalize"]:
    return Processor(resample, size, (0.0,) * 3, (1.0,) * 3)
  mean = bounds.mean(f"{where}image_mean", _thrice(fields["image_mean"]))
  std = bounds.std(f"{where}image_std", _thrice(fields["image_std"]))
  return Processor(
    resample, size, tuple(map(float, mean)), tuple(map(float, std))
  )


def to_json(processor: Processor, kind: str) -> dict[str, Any]:
  """Return a preprocessor_config.json that transformers 4 and 5 load.

  It names the class that encoders of this kind are published with, or one that
  can do the framing. An edge that equals the size is read back without edge.

  Args:
    kind: siglip, clip, dinov2, vit or vit_mae.

  Raises:
    InputError: another kind, or an edge below the size.
  """
  if kind not in _CLASSES:
    raise errors.InputError(
      f"image processor: no class is known for encoders of kind {kind!r};"
      f" choose one of {', '.join(_CLASSES)}"
    )
  how = framing.parse_resample(processor.resample)
  square = {"height": processor.size, "width": processor.size}
  fields: dict[str, Any] = {
    "image_processor_type": _CLASSES[kind][how.crop],
    "size": square,
  }
  if how.crop:
    edge = how.edge or processor.size
    if edge < processor.size:
      raise errors.InputError(
        f"image processor: resample={processor.resample} has a shortest edge"
        f" below the size {processor.size}; give {processor.size} or more"
      )
    fields["size"] = {"shortest_edge": edge}
    fields |= {"do_center_crop": True, "crop_size": square}
  numbers = {name: number for number, name in _FILTERS.items()}
  return fields | {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": numbers[how.filter],
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(processor.mean),
    "image_std": list(processor.std),
  }


def _find(folder: Path) -> tuple[str, Mapping[str, Any]] | None:
  """Return what names a field in an error, and the fields."""
  path = folder / "processor_config.json"
  nested = safetensor_files.read_json(path) if path.exists() else {}
  if "image_processor" in nested:
    fields = nested["image_processor"]
    if not isinstance(fields, dict):
      raise errors.InputError(f"{path}: image_processor holds no JSON object")
    return f"{path}: image_processor.", fields
  path = folder / "preprocessor_config.json"
  return (
    (f"{path}: ", safetensor_files.read_json(path)) if path.exists() else None
  )


def _defaults(where: str, said: Mapping[str, Any], kind: str) -> dict[str, Any]:
  for field in ("image_processor_type", "feature_extractor_type"):
    if field not in said:
      continue
    name = f"{said[field]}".replace("FeatureExtractor", "ImageProcessor")
    name = name.removesuffix("Fast").removesuffix("Pil")
    if name not in _DEFAULTS:
      raise errors.InputError(
        f"{where}{field} is {bounds.told(said[field])}; it can be"
        f" {', '.join(_DEFAULTS)}"
      )
    return _DEFAULTS[name]
  if "auto_map" in said:
    raise errors.InputError(
      f"{where}auto_map names code of its publisher, which is not run; give"
      f" image_processor_type, one of {', '.join(_DEFAULTS)}"
    )
  if kind in ("vit", "vit_mae"):
    return _DEFAULTS["ViTImageProcessor"]
  size = said.get("size")
  edge = isinstance(size, dict) and "shortest_edge" in size
  if said.get("do_center_crop", edge or "crop_size" in said):
    return _CROP
  return _SQUASH | {"default_to_square": True}


def _check_steps(where: str, fields: Mapping[str, Any]) -> None:
  for name in ("do_resize", "do_rescale"):
    if fields[name] is not True:
      raise errors.InputError(
        f"{where}{name} is {bounds.told(fields[name])}; it must be true, since"
        " images are always resized and divided by 255"
      )
  factor = fields["rescale_factor"]
  # Some files hold 1/255 as it was rounded to float32.
  if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
    raise errors.InputError(
      f"{where}rescale_factor is {bounds.told(factor)}; only 1/255 is done"
    )
  for name in ("do_center_crop", "do_normalize", "default_to_square"):
    bounds.truth(f"{where}{name}", fields[name])
  steps = {k for k in fields if k.startswith("do_")} - _KNOWN_STEPS
  wrong = [
    f"{name} is {bounds.told(fields[name])}"
    for name in sorted(steps | {"use_square_size"})
    if fields.get(name)
  ]
  if wrong:
    raise errors.InputError(
      f"{where}{'; '.join(wrong)}; that is not done to images here"
    )


def _framing(where: str, fields: Mapping[str, Any]) -> tuple[str, int]:
  """Return the resample and the side of the square."""
  number = fields["resample"]
  if not bounds.is_whole(number) or number not in _FILTERS:
    known = ", ".join(f"{n} ({name})" for n, name in _FILTERS.items())
    raise errors.InputError(
      f"{where}resample is {bounds.told(number)}; it can be {known}"
    )
  name = _FILTERS[number]
  size, crop = fields["size"], None
  if fields["do_center_crop"]:
    crop = _square(where, "crop_size", fields["crop_size"])
  if isinstance(size, dict):
    size = {key: side for key, side in size.items() if side is not None}
  elif _is_side(size) and not fields["default_to_square"]:
    size = {"shortest_edge": size}
  if isinstance(size, dict) and size.keys() == {"shortest_edge"}:
    edge = size["shortest_edge"]
    if crop is None or not _is_side(edge) or edge < crop:
      raise errors.InputError(
        f"{where}size is {size}, cropped to {crop}; images become square by a"
        " centre crop (do_center_crop, crop_size) of at most the shortest edge"
      )
    return f"crop_{name}" + (f":{edge}" if edge > crop else ""), crop
  side = _square(where, "size", size)
  if crop not in (None, side):
    raise errors.InputError(
      f"{where}crop_size is {crop} and size {side}, squashed; only a shortest"
      " edge is cropped here"
    )
  return name, side


def _square(where: str, name: str, value: Any) -> int:
  sides = [value, value]
  if isinstance(value, dict) and value.keys() == {"height", "width"}:
    sides = [value["height"], value["width"]]
  if not all(map(_is_side, sides)) or sides[0] != sides[1]:
    raise errors.InputError(
      f"{where}{name} is {bounds.told(value)}; it must be a number of pixels, or"
      " a height and an equal width"
    )
  return sides[0]


def _is_side(value: Any) -> bool:
  return bounds.is_whole(value) and 0 < value <= bounds.PIXELS


def _thrice(value: Any) -> Any:
  """Return a list as it is; one number stands for all channels."""
  return value if isinstance(value, list) else [value] * 3
