"""The layout of LLaVA-NeXT's checkpoints, which the paper's code writes, too.

Its config.json is that of the language model and names the vision tower; what
the tower is like is in that tower's own config.json, or in the shapes of the
tensors. A SigLIP tower comes without the block behind its features.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pivot_jax import errors
from pivot_jax.weights.convert import hf_config, infer, safetensor_files, source

MODEL_TYPES = ("llava_qwen", "llava_qwen2")
# A Sequential of Linear, GELU, Linear.
PROJECTOR = tuple(
  (rf"model\.mm_projector\.{index}\.({leaf})", f"projector.{name}")
  for index, name in ((0, "linear_1"), (2, "linear_2"))
  for leaf in ("weight", "bias")
)


def read(
  folder: Path, config: Mapping[str, Any], found: source.Found
) -> hf_config.Configs:
  """Return what a folder holds.

  Raises:
    InputError: a projector, a tiling of images or a tower that is not computed
      here, or a tower whose shape cannot be told.
  """
  path = folder / "config.json"
  _require(
    path,
    config,
    mm_projector_type=("mlp2x_gelu",),
    mm_vision_select_feature=("patch", None),
    mm_vision_select_layer=(-2, None),
    # Tiles, padding and a newline token are another model.
    image_aspect_ratio=("square", None),
    mm_patch_merge_type=("flat", None),
    mm_use_im_start_end=(False, None),
  )
  name = config.get("mm_vision_tower")
  if not isinstance(name, str):
    raise errors.InputError(f"{path}: mm_vision_tower names no encoder")
  tower = tower_folder(folder, config)
  if tower is not None:
    beside = tower / "config.json"
    inner = safetensor_files.read_json(beside)
    kind = inner.get("model_type")
    if kind in ("siglip", "clip"):
      inner, kind = inner.get("vision_config") or {}, f"{kind}_vision_model"
    if kind not in ("siglip_vision_model", "clip_vision_model"):
      raise errors.InputError(
        f"{beside}: model_type is {kind!r}; an MLLM is read with a SigLIP or a"
        " CLIP encoder"
      )
    vision = hf_config.vision(beside, inner, kind=kind, feature_layer=-2)
  else:
    vision = _from_shapes(path, name, found)
  return hf_config.Configs("llava_qwen", vision, hf_config.llm(path, config))


def tower_folder(folder: Path, config: Mapping[str, Any]) -> Path | None:
  """Return the folder of the tower itself, if mm_vision_tower names one.

  It lies inside the model's, or is a path; a model of the hub is not looked for.
  """
  name = str(config.get("mm_vision_tower"))
  for candidate in (folder / name, Path(name).expanduser()):
    if (candidate / "config.json").exists():
      return candidate
  return None


def _from_shapes(path, name, found):
  """The tower as its published kind has it, sized by the tensors."""
  family = "clip" if "clip" in name.lower() else "siglip"
  if "siglip" in name.lower():
    family = "siglip"
  shapes = {
    key.removeprefix("vision."): found.shape(key)
    for key in found.keys
    if key.startswith("vision.")
  }
  return infer.vision(
    str(path),
    shapes,
    family=family,
    layout=family,
    named=name,
    # The paper's code saves a SigLIP tower up to the block that is read.
    cut=family == "siglip",
  )


def _require(path, config, **allowed):
  wrong = [
    f"{name} is {config.get(name)!r}"
    for name, values in allowed.items()
    if config.get(name) not in values
  ]
  if wrong:
    raise errors.InputError(
      f"{path}: {'; '.join(wrong)}; this model cannot be computed here (the"
      " paper's: mlp2x_gelu, one square image, patches of the layer -2)"
    )
