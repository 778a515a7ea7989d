"""README.md of an exported folder: what it is, how it was made and measured.

Everything is read from the artifact: its model.json, and `done.json` of the
stages around it if it lies in a run's folder.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from pivot_jax import files

_PROBES = ("linear_probe", "segment_probe", "gradcam")
_TAGS = {"timm": "timm", "big_vision": "big_vision"}


def text(
  meta: Mapping[str, Any],
  folder: pathlib.Path | None,
  name: str,
  use: str,
) -> str:
  """Return the card.

  Args:
    meta: model.json.
    folder: the artifact's, among whose siblings the stages are looked up; None
      where there is none.
    name: the address it was exported from.
    use: the class that loads it, or timm or big_vision.
  """
  run = _run(folder)
  parts = [_head(use), _what(meta, use), _not_trained(meta, use)]
  parts += [_recipe(run, meta), _measured(run)]
  versions = meta.get("versions") or files.versions()
  written = ", ".join(f"{k} {v}" for k, v in sorted(versions.items()))
  parts.append(
    f"## Made by\n\nExported from `{_public(name)}` by pivot_jax. {written}."
  )
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
    if vision.get("feature_tokens"):
      lines.append(
        f"In training they were resized to {vision['feature_tokens']} features an"
        " image, bilinearly, which this file cannot say."
      )
    how = (meta.get("preprocessing") or {}).get("resample")
    if how:
      lines.append(
        f"Images are brought to size by `{how}`, then scaled to mean"
        f" {list(vision['image_mean'])} and standard deviation"
        f" {list(vision['image_std'])}."
      )
    usual = 1e-5 if vision.get("family") == "clip" else 1e-6
    epsilon = vision["layer_norm_eps"]
    if use == "timm" and epsilon != usual:
      lines.append(
        f"The norms were computed with epsilon {epsilon:g}; timm has {usual:g}."
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
  """What transformers calls the features, if its class has them."""
  if not use.endswith("Model") or (vision["final_norm"] and layer != -1):
    return ""
  cut = "[:, 1:]" if vision.get("class_token") else ""
  if not vision["final_norm"]:
    return f": `output_hidden_states=True`, `hidden_states[{layer}]{cut}`"
  order = ""
  if vision.get("family") == "vit_mae":
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    order = (
      f", with `noise=torch.arange({patches})[None]` for each image, since the"
      " class shuffles the patches otherwise"
    )
  return f": `last_hidden_state{cut}`{order}"


def _not_trained(meta: Mapping[str, Any], use: str) -> str:
  vision, unread = meta.get("vision"), meta.get("unread")
  if not vision or use.startswith("Qwen"):
    return ""
  modules = [
    name
    for name in (unread or {}).get("modules", ())
    # timm's models have neither of the two.
    if use != "timm" or name not in ("pooler", "mask_token")
  ]
  if modules:
    said = (
      f"These modules are not computed with: {', '.join(modules)}. They"
      f" are those of the original weights (`{_public(unread['address'])}`, CRC32"
      f" {unread['fingerprint']}), so that what is computed through them mixes"
      " trained and untrained parts."
    )
  elif unread or vision["final_norm"]:
    said = "Nothing: every part of the encoder was open to training."
  else:
    said = (
      "The encoder has no blocks behind these features; those in the file do"
      " nothing (zero weights), and pooled outputs mean nothing."
    )
  return f"## What was not trained\n\n{said}"


def _public(address: str) -> str:
  """An address without the folders of the machine it was used on."""
  kind, colon, path = address.partition(":")
  where, question, query = (path if colon else kind).partition("?")
  if where.startswith(("/", "~", ".")):
    where = pathlib.PurePath(where).name
  return f"{f'{kind}:' if colon else ''}{where}{question}{query}"


class _Run(NamedTuple):
  """The run that an artifact lies in: its settings and its finished stages."""

  name: str
  config: Mapping[str, Any]
  done: Mapping[str, Mapping[str, Any]]

  def edges(self, stage: str) -> Mapping[str, str]:
    """Return the inputs of a stage, as the recipe names them."""
    return (self.config.get(stage) or {}).get("inputs", {})


def _run(folder: pathlib.Path | None) -> _Run | None:
  if folder is None or not (folder / "done.json").exists():
    return None
  # Further seeds lie one level deeper than the settings.
  for parent in (folder.parent, folder.parent.parent):
    if (parent / "config.json").exists() and (parent / "plan.txt").exists():
      done = {
        path.parent.name: files.read_json(path)
        for path in sorted(folder.parent.glob("*/done.json"))
      }
      config = files.read_json(parent / "config.json")
      return _Run(folder.name, config, done)
  return None


def _recipe(run: _Run | None, meta: Mapping[str, Any]) -> str:
  if run is None:
    sources = meta.get("sources")
    said = ", ".join(
      f"{part} `{_public(where)}`"
      for part, where in sorted((sources or {}).items())
      if isinstance(where, str)
    )
    said = said or "not recorded"
    return f"## Recipe\n\nWeights from: {said}."
  rows, name = [], run.name
  while name in run.config:
    rows.append(_stage_row(name, run))
    edges = run.edges(name)
    before = edges.get("init") or edges.get("vision") or ""
    if not before.startswith("@"):
      rows.append(f"| start | `{_public(before)}` | | | | |")
      break
    name = before[1:].partition(":")[0]
  header = (
    "| stage | objective | data | batch | updates | learning rates |\n"
    "|---|---|---|---|---|---|"
  )
  return "\n".join(["## Recipe\n", header, *reversed(rows)])


def _stage_row(name: str, run: _Run) -> str:
  fields = run.config[name]
  if fields["kind"] != "train":
    return f"| {name} | | | | | |"
  rates = ", ".join(f"`{pattern}` {rate:g}" for pattern, rate in fields["lr"])
  data = fields["data"]
  names = [data] if isinstance(data, str) else [part[0] for part in data]
  found = ", ".join(f"{n} ({_origin(run, n)})" for n in names)
  if name not in run.done:
    # The result that ships with the package was taken.
    name = f"{name} ({fields.get('shipped') or 'not run here'})"
  return (
    f"| {name} | {fields['objective']} | {found} | {fields['batch']}"
    f" | {fields['steps']} | {rates} |"
  )


def _origin(run: _Run, source: str) -> str:
  spec = run.config["sources"].get(source, {})
  path = spec.get("path")
  return (
    pathlib.PurePath(path).name
    if path
    else f"embedded {spec.get('kind', 'data')}"
  )


def _measured(run: _Run | None) -> str:
  """The results of the probes of this artifact, as the stages wrote them."""
  rows = []
  for name, done in run.done.items() if run else ():
    edges = run.edges(name).values()
    mine = any(edge.partition(":")[0] == f"@{run.name}" for edge in edges)
    if not mine or done["kind"] not in _PROBES:
      continue
    for key, found in sorted(done["metrics"].items()):
      if isinstance(found, Mapping) and "value" in found:
        error = found.get("se")
        spread = "" if error is None else f" ± {error:.3g}"
        rows.append(
          f"| {name} | {key} | {found['value']:.4g}{spread} | {found['n']} |"
        )
  if not rows:
    return "## Measured\n\nNo probe of these weights is recorded beside them."
  header = "| probe | number | value ± standard error | n |\n|---|---|---|---|"
  return "\n".join(["## Measured\n", header, *rows])
