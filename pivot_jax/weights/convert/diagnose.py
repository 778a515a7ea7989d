"""One error for all tensors that do not fit, with the reason if it shows."""

import math
import re
from collections.abc import Mapping, Sequence

from pivot_jax import errors
from pivot_jax.models import vit

Shape = tuple[int, ...]


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
  found = [f"{kind}: {', '.join(p)}" for kind, p in problems.items() if p]
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


def _reason(missing, unexpected, misshapen, vision) -> str:
  """Say what the file looks like, or nothing."""
  names = " ".join(unexpected)
  if re.search(r"lora_[AB]\b|lora_[AB]\.", names):
    return "this looks like a LoRA adapter: merge it into its base model first"
  if re.search(r"qweight|qzeros|weight_scale|\.SCB|absmax", names):
    return "this looks quantised: give the unquantised weights"
  if re.search(r"register_tokens|reg_token", names):
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
    if "pos" in name:
      rows = has[-2] - vision.class_token
      side = math.isqrt(rows)
      return (
        f"its positions are for {side} x {side} patches, images of"
        f" {side * vision.patch_size} pixels: correct image_size in its config,"
        f" and ask for the other size with ?image_size="
        f"{vision.image_size}&positions=big_vision (or dinov2)"
      )
  return ""
