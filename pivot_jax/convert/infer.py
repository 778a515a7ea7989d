"""A published encoder's configuration from the shapes of its tensors.

For files that carry no configuration. The number of heads does not show in
shapes: it is known for the published widths, and asked for otherwise.
"""

import math
import re
from collections.abc import Mapping

from pivot_jax import errors
from pivot_jax.convert import families, layouts
from pivot_jax.models import vit


def vision(
  where: str,
  shapes: Mapping[str, tuple[int, ...]],
  *,
  family: str,
  layout: str,
  named: str = "",
  heads: int | None = None,
  cut: bool = False,
) -> vit.VisionConfig:
  """Returns the configuration of the tower that has these shapes.

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

  def shape(name: str) -> tuple[int, ...]:
    at = layouts.place(layout, name)
    if at is None or at.name not in shapes:
      raise errors.InputError(
        f"{where}: has no tensor {at.name if at else name}, so it is no"
        f" {family} encoder in this layout"
      )
    found = shapes[at.name][at.lead :]
    return (found[0] // at.blocks, *found[1:])

  width, _, patch, _ = _patches(where, shape)
  choices = families.CHOICES[family]
  class_token = int(choices.get("class_token", False))
  positions = shape("embeddings.position_embedding.weight")[0] - class_token
  grid = math.isqrt(positions)
  if grid**2 != positions:
    raise errors.InputError(
      f"{where}: {positions} positions are no square grid of patches"
    )
  gate = layouts.place(layout, "encoder.layers.0.mlp.gate_proj.weight")
  fc1 = layouts.place(layout, "encoder.layers.0.mlp.fc1.weight")
  gated = family == "dinov2" and _is_gated(shapes, gate, fc1, layout, shape)
  inner = "gate_proj" if gated else "fc1"
  return vit.VisionConfig(
    image_size=image_size(named, grid, patch),
    patch_size=patch,
    hidden_size=width,
    intermediate_size=shape(f"encoder.layers.0.mlp.{inner}.weight")[0],
    num_hidden_layers=(
      _published_depth(where, width, _depth(shapes, layout))
      if cut
      else _depth(shapes, layout)
    ),
    num_attention_heads=heads or _heads(where, family, width),
    family=family,
    gated_mlp=gated,
    **choices,
  )


def _patches(where, shape):
  found = shape("embeddings.patch_embedding.weight")
  if len(found) != 4 or found[2] != found[3]:
    raise errors.InputError(
      f"{where}: the patch embedding is {found}; a fixed-resolution encoder has"
      " [width, 3, patch, patch] (SigLIP2 NaFlex is not read)"
    )
  return found


def _is_gated(shapes, gate, fc1, layout, shape) -> bool:
  """In timm's layout both kinds of MLP are called fc1 and fc2."""
  if gate is None or gate.name not in shapes:
    return False
  if fc1 is None or gate.name != fc1.name:
    return True
  down = layouts.place(layout, "encoder.layers.0.mlp.fc2.weight")
  return shapes[gate.name][0] == 2 * shapes[down.name][1]


def _depth(shapes, layout) -> int:
  first = layouts.place(layout, "encoder.layers.0.layer_norm1.weight").name
  pattern = re.escape(first).replace("0", r"(\d+)", 1)
  return max(int(m[1]) for n in shapes if (m := re.fullmatch(pattern, n))) + 1


def _published_depth(where: str, width: int, stored: int) -> int:
  depth = families.SIGLIP_DEPTHS.get(width, stored)
  if stored not in (depth - 1, depth):
    raise errors.InputError(
      f"{where}: {stored} blocks of width {width} are no SigLIP tower, which has"
      f" {depth} (or {depth - 1} where the last is cut off)"
    )
  return depth


def _heads(where: str, family: str, width: int) -> int:
  if width not in families.HEADS[family]:
    raise errors.InputError(
      f"{where}: how many attention heads a {family} encoder of width {width}"
      " has cannot be told from its tensors; give config.json beside it, with"
      ' {"model_args": {"num_heads": N}}'
    )
  return families.HEADS[family][width]


def image_size(named: str, grid: int, patch: int) -> int:
  """Returns the last number in a name that has this grid of patches.

  Without one, the grid times the patch: 378 and not 384 for 27 patches of 14,
  of which SigLIP's names say 384.
  """
  numbers = [int(n) for n in re.findall(r"(?<!\d)\d+(?!\d)", named)]
  fits = [n for n in numbers if n // patch == grid and n >= patch]
  return fits[-1] if fits else grid * patch
