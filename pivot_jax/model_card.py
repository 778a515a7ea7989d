"""README.md of an exported folder: what it is, how it was made and measured.

Everything is read from the artifact: its model.json, and `done.json` of the
stages around it if it lies in a run's folder.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from pivot_jax import files

_TAGS = {"timm": "timm", "big_vision": "big_vision"}


def text(
  meta: Mapping[str, Any],
  folder: pathlib.Path | None,
  name: str,
  use: str,
) -> str:
  """Returns the card.

  Args:
    meta: model.json.
    folder: the artifact's, among whose siblings the stages are looked up; None
      where there is none.
    name: the address it was exported from.
    use: the class that loads it, or timm or big_vision.
  """
  stages = _stages(folder)
  parts = [_head(use), _what(meta, use), _not_trained(meta)]
  parts += [_recipe(stages, folder, meta), _measured(stages, folder)]
  versions = meta.get("versions") or files.versions()
  written = ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))
  parts.append(f"## Made by\n\nExported from `{name}` by pivot_jax. {written}.")
  return "\n\n".join(part for part in parts if part) + "\n"


def _head(use: str) -> str:
  library = _TAGS.get(use, "transformers")
  task = (
    "image-text-to-text"
    if use.startswith("Llava")
    else "text-generation"
    if use.startswith("Qwen")
    else "image-feature-extraction"
  )
  return (
    f"---\nlibrary_name: {library}\npipeline_tag: {task}\ntags:\n- pivot\n---\n\n"
    f"# {_title(use)}"
  )


def _title(use: str) -> str:
  if use.startswith("Llava"):
    return "A multimodal language model"
  if use.startswith("Qwen"):
    return "A language model"
  return "A vision encoder"


def _what(meta, use) -> str:
  lines = [f"Loads as `{use}`."]
  vision = meta.get("vision")
  if vision and not use.startswith("Qwen"):
    layer, depth = vision["feature_layer"], vision["num_hidden_layers"]
    used = layer if layer >= 0 else depth + 1 + layer
    norm = "with" if vision["final_norm"] else "without"
    lines.append(
      f"{_family(vision)}, images of {vision['image_size']} x"
      f" {vision['image_size']} pixels, patches of {vision['patch_size']}, width"
      f" {vision['hidden_size']}, {depth} blocks. The features that were trained,"
      f" and that multimodal models read, are the patches after block {used} of"
      f" {depth}, {norm} the final norm"
      f"{_where(use, used - depth - 1, vision)}."
    )
    how = (meta.get("preprocessing") or {}).get("resample")
    if how:
      lines.append(
        f"Images are brought to size by `{how}`, then scaled to mean"
        f" {vision['image_mean']} and standard deviation {vision['image_std']}."
      )
  return "\n\n".join(lines)


def _family(vision: Mapping[str, Any]) -> str:
  names = {
    "siglip": "SigLIP",
    "clip": "CLIP",
    "dinov2": "DINOv2",
    "vit": "ViT",
    "vit_mae": "MAE",
  }
  return names[vision.get("family", "siglip")]


def _where(use: str, layer: int, vision: Mapping[str, Any]) -> str:
  if not use.endswith(("VisionModel", "Model")) or vision["final_norm"]:
    return ""
  cut = "[:, 1:]" if vision.get("class_token") else ""
  return f": `output_hidden_states=True`, `hidden_states[{layer}]{cut}`"


def _not_trained(meta) -> str:
  if not meta.get("vision"):
    return ""
  lines = ["## What was not trained"]
  unread = meta.get("unread")
  if unread:
    lines.append(
      "The blocks behind these features, the final norm and the pooling head are"
      f" those of the original weights (`{unread['address']}`, CRC32"
      f" {unread['fingerprint']}), byte for byte: pooled outputs and logits of the"
      " whole tower mix trained and untrained parts."
    )
  else:
    lines.append(
      "The encoder has no blocks behind these features; those in the file do"
      " nothing (zero weights), and pooled outputs mean nothing."
    )
  return "\n\n".join(lines)


def _stages(folder: pathlib.Path | None) -> dict[str, dict[str, Any]]:
  """Returns {stage: done.json} of the run that the artifact lies in."""
  if folder is None or not (folder / "done.json").exists():
    return {}
  return {
    path.parent.name: files.read_json(path)
    for path in sorted(folder.parent.glob("*/done.json"))
  }


def _recipe(stages, folder, meta) -> str:
  if not stages:
    sources = meta.get("sources")
    said = json.dumps(sources, sort_keys=True) if sources else "not recorded"
    return f"## Recipe\n\nWeights from: {said}."
  rows, name = [], folder.name
  while name in stages:
    done = stages[name]
    rows.append(_stage_row(name, done))
    edges = done["fields"].get("inputs", {})
    before = edges.get("init") or edges.get("vision") or ""
    if not before.startswith("@"):
      rows.append(f"| start | | `{before}` | | | |")
      break
    name = before[1:].partition(":")[0]
  header = (
    "| stage | objective | data | batch | updates | learning rates |\n"
    "|---|---|---|---|---|---|"
  )
  return "\n".join(["## Recipe\n", header, *reversed(rows)])


def _stage_row(name: str, done: Mapping[str, Any]) -> str:
  fields = done["fields"]
  if done["kind"] != "train":
    return f"| {name} | | | | | |"
  rates = ", ".join(f"`{pattern}` {rate:g}" for pattern, rate in fields["lr"])
  data = fields["data"]
  names = [data] if isinstance(data, str) else [part[0] for part in data]
  sources = fields.get("sources", {})
  found = [
    f"{n} ({sources[n].get('path') or sources[n]['kind']})"
    if n in sources
    else n
    for n in names
  ]
  return (
    f"| {name} | {fields['objective']} | {', '.join(found)} | {fields['batch']}"
    f" | {fields['steps']} | {rates} |"
  )


def _measured(stages, folder) -> str:
  """The results of the probes of this artifact, as the stages wrote them."""
  rows = []
  for name, done in stages.items():
    edges = done["fields"].get("inputs", {}).values()
    mine = any(e.partition(":")[0] == f"@{folder.name}" for e in edges)
    if not mine or done["kind"] not in ("linear_probe", "segment_probe"):
      continue
    for key, value in done["metrics"].items():
      if isinstance(value, (int, float)):
        rows.append(f"| {name} | {key} | {value:.4g} |")
      elif isinstance(value, Mapping) and "value" in value:
        rows.append(f"| {name} | {key} | {value['value']:.4g} |")
  if not rows:
    return "## Measured\n\nNo probe of these weights is recorded beside them."
  return "\n".join(
    ["## Measured\n", "| probe | number | value |\n|---|---|---|", *rows]
  )
