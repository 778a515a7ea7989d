"""A published encoder's configuration from the shapes of its tensors.

For files that carry no configuration. The number of heads does not show in
shapes: it is known for the published widths, and asked for otherwise.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from pivot_jax import errors
from pivot_jax.models import vit
from pivot_jax.weights.convert import families, layouts


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

  tower = _Tower(where, shapes, family, layout)
  width, patch = tower.patches()
  choices = families.CHOICES[family]
  positions = tower.shape("embeddings.position_embedding.weight")[0]
  positions -= choices.get("class_token", False)
  grid = math.isqrt(positions)
  if grid**2 != positions:
    raise errors.InputError(
      f"{where}: {positions} positions are no square grid of patches"
    )
  gated = family == "dinov2" and tower.is_gated()
  inner = f"encoder.layers.0.mlp.{'gate_proj' if gated else 'fc1'}.weight"
  depth = tower.depth()
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


class _Tower(NamedTuple):
  """The shapes of a file's tower, asked for by our names."""

  where: str
  shapes: Mapping[str, tuple[int, ...]]
  family: str
  layout: str

  def shape(self, name: str) -> tuple[int, ...]:
    at = layouts.place(self.layout, name)
    if at is None or at.name not in self.shapes:
      raise errors.InputError(
        f"{self.where}: has no tensor {at.name if at else name}, so it is no"
        f" {self.family} encoder in this layout"
      )
    found = self.shapes[at.name][at.lead :]
    return (found[0] // at.blocks, *found[1:])

  def patches(self) -> tuple[int, int]:
    """The width and the side of a patch."""
    found = self.shape("embeddings.patch_embedding.weight")
    if len(found) != 4 or found[2] != found[3]:
      raise errors.InputError(
        f"{self.where}: the patch embedding is {found}; a fixed-resolution"
        " encoder has [width, 3, patch, patch] (SigLIP2 NaFlex is not read)"
      )
    return found[0], found[2]

  def is_gated(self) -> bool:
    """In timm's layout both kinds of MLP are called fc1 and fc2."""
    gate, fc1, fc2 = (
      layouts.place(self.layout, f"encoder.layers.0.mlp.{name}.weight")
      for name in ("gate_proj", "fc1", "fc2")
    )
    if gate.name not in self.shapes:
      return False
    if gate.name != fc1.name:
      return True
    return self.shapes[gate.name][0] == 2 * self.shapes[fc2.name][1]

  def depth(self) -> int:
    first = layouts.place(self.layout, "encoder.layers.0.layer_norm1.weight")
    pattern = re.escape(first.name).replace("0", r"(\d+)", 1)
    found = [re.fullmatch(pattern, name) for name in self.shapes]
    return max(int(match[1]) for match in found if match) + 1


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
  """Return the last number in a name that has this grid of patches.

  Without one, the grid times the patch: 378 and not 384 for 27 patches of 14,
  of which SigLIP's names say 384.
  """
  numbers = [int(n) for n in re.findall(r"(?<!\d)\d+(?!\d)", named)]
  fits = [n for n in numbers if n // patch == grid and n >= patch]
  return fits[-1] if fits else grid * patch
