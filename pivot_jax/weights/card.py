"""README.md of an exported folder: its contents, making and measurements.

The words are in `templates/card.md.j2`. The facts are read from the artifact:
its model.json, and `done.json` of the stages around it if it lies in a run's
folder.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jinja2

from pivot_jax import files

_PROBES = ("linear_probe", "segment_probe", "gradcam")
_TAGS = {"timm": "timm", "big_vision": "big_vision"}
_FAMILIES = {
  "siglip": "SigLIP",
  "clip": "CLIP",
  "dinov2": "DINOv2",
  "vit": "ViT",
  "vit_mae": "MAE",
}
# The task of the hub, and what the card is called, by how the class begins.
_KINDS = {
  "Llava": ("image-text-to-text", "A multimodal language model"),
  "Qwen": ("text-generation", "A language model"),
  "": ("image-feature-extraction", "A vision encoder"),
}


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
  task, title = next(_KINDS[k] for k in _KINDS if use.startswith(k))
  versions = meta.get("versions") or files.versions()
  sources = meta.get("sources") or {}
  vision = None if use.startswith("Qwen") else meta.get("vision")
  return _template().render(
    use=use,
    name=name,
    library=_TAGS.get(use, "transformers"),
    task=task,
    title=title,
    **(_encoder(meta, use) if vision else {"vision": None}),
    stages=list(_stages(run))[::-1] if run else (),
    sources=[
      f"{part} `{_public(where)}`"
      for part, where in sorted(sources.items())
      if isinstance(where, str)
    ],
    probes=list(_probes(run)) if run else (),
    versions=[f"{k} {v}" for k, v in sorted(versions.items())],
  )


def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("pivot_jax.weights"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
  environment.filters["public"] = _public
  return environment.get_template("card.md.j2")


def _encoder(meta: Mapping[str, Any], use: str) -> dict[str, Any]:
  """Return the facts about an encoder."""
  vision, unread = meta["vision"], meta.get("unread")
  layer, depth = vision["feature_layer"], vision["num_hidden_layers"]
  used = layer if layer >= 0 else depth + 1 + layer
  # The epsilon that timm's class has, where it is another one.
  usual = 1e-5 if vision.get("family") == "clip" else 1e-6
  other = use == "timm" and vision["layer_norm_eps"] != usual
  return {
    "vision": {"feature_tokens": 0, **vision},
    "family": _FAMILIES[vision.get("family", "siglip")],
    "depth": depth,
    "used": used,
    "place": _place(use, used - depth - 1, vision),
    "resample": (meta.get("preprocessing") or {}).get("resample"),
    "epsilon": usual if other else None,
    "unread": unread,
    "modules": [
      name
      for name in (unread or {}).get("modules", ())
      # timm's models have neither of the two.
      if use != "timm" or name not in ("pooler", "mask_token")
    ],
  }


def _place(use: str, layer: int, vision: Mapping[str, Any]) -> str:
  """Return how transformers names the features, if its class has them."""
  if not use.endswith("Model") or (vision["final_norm"] and layer != -1):
    return ""
  cut = "[:, 1:]" if vision.get("class_token") else ""
  if not vision["final_norm"]:
    return f"`output_hidden_states=True`, `hidden_states[{layer}]{cut}`"
  order = ""
  if vision.get("family") == "vit_mae":
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    order = (
      f", with `noise=torch.arange({patches})[None]` for each image, since the"
      " class shuffles the patches otherwise"
    )
  return f"`last_hidden_state{cut}`{order}"


def _public(address: str) -> str:
  """Return an address without the folders of the machine it was used on."""
  where, question, query = address.partition("?")
  parts = [
    pathlib.PurePath(part).name if part.startswith(("/", "~", ".")) else part
    for part in where.split(":")
  ]
  return f"{':'.join(parts)}{question}{query}"


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


def _stages(run: _Run) -> Iterator[list[str]]:
  """Yield the cells of the stages an artifact came through, the last first."""
  name = run.name
  while name in run.config:
    yield _stage_cells(name, run)
    edges = run.edges(name)
    before = edges.get("init") or edges.get("vision") or ""
    if not before.startswith("@"):
      yield ["start", f"`{_public(before)}`", *[""] * 4]
      break
    name = before[1:].partition(":")[0]


def _stage_cells(name: str, run: _Run) -> list[str]:
  fields = run.config[name]
  if fields["kind"] != "train":
    return [name, *[""] * 5]
  rates = ", ".join(f"`{pattern}` {rate:g}" for pattern, rate in fields["lr"])
  data = fields["data"]
  names = [data] if isinstance(data, str) else [part[0] for part in data]
  found = ", ".join(f"{n} ({_origin(run, n)})" for n in names)
  if name not in run.done:
    # The result that ships with the package was taken.
    name = f"{name} ({fields.get('shipped') or 'not run here'})"
  return [
    *(name, fields["objective"], found),
    *(str(fields["batch"]), str(fields["steps"]), rates),
  ]


def _origin(run: _Run, source: str) -> str:
  spec = run.config["sources"].get(source, {})
  path = spec.get("path")
  return (
    pathlib.PurePath(path).name
    if path
    else f"embedded {spec.get('kind', 'data')}"
  )


def _probes(run: _Run) -> Iterator[list[str]]:
  """Yield the cells of this artifact's probes, as the stages wrote them."""
  for name, done in run.done.items():
    edges = run.edges(name).values()
    mine = any(edge.partition(":")[0] == f"@{run.name}" for edge in edges)
    if not mine or done["kind"] not in _PROBES:
      continue
    for key, found in sorted(done["metrics"].items()):
      if isinstance(found, Mapping) and "value" in found:
        error = found.get("se")
        spread = "" if error is None else f" ± {error:.3g}"
        yield [name, key, f"{found['value']:.4g}{spread}", str(found["n"])]
