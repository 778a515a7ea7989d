"""README.md of an exported folder: its contents, making and measurements.

The words are in `templates/card.md.j2`. The facts are read from the artifact:
its model.json, and `done.json` of the stages around it if it lies in a run's
folder. It may be somebody else's: whatever is put into the template goes
through `_inert`, which leaves numbers and our own words (`Markup`) as they are.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from pivot_jax import files, metrics, texts
from pivot_jax.errors import InputError

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
  stages, probes = _tables(run) if run else ((), ())
  task, title = next(_KINDS[k] for k in _KINDS if use.startswith(k))
  versions = meta.get("versions") or files.versions()
  sources = meta.get("sources") or {}
  vision = None if use.startswith("Qwen") else meta.get("vision")
  return _template().render(
    use=Markup(use),
    name=name,
    library=Markup(_TAGS.get(use, "transformers")),
    task=Markup(task),
    title=Markup(title),
    **(_encoder(meta, use) if vision else {"vision": None}),
    stages=stages,
    sources=[
      (part, _code(_public(where)))
      for part, where in sorted(sources.items())
      if isinstance(where, str)
    ],
    probes=probes,
    versions=sorted(versions.items()),
  )


def _tables(run: "_Run") -> tuple[list[list[Any]], list[list[Any]]]:
  """Return the rows of the stages, the first first, and of the probes."""
  try:
    return list(_stages(run))[::-1], list(_probes(run))
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise InputError(
      f"{run.folder}: the config.json of the run that it lies in is not as a run"
      f" writes it ({error!r}): move the artifact elsewhere"
    ) from error


def _inert(value: Any) -> Any:
  """Return a value as Markdown in which it is no markup."""
  if isinstance(value, Markup | int | float) or value == "":
    return value
  if isinstance(value, list | tuple):
    return f"[{', '.join(str(_inert(one)) for one in value)}]"
  return texts.markdown(str(value))


def _code(text: str) -> Markup:
  return Markup(texts.code_span(text))


def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("pivot_jax.weights"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    finalize=_inert,
  )
  environment.filters["code"] = _code
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
    "family": Markup(_FAMILIES[vision.get("family", "siglip")]),
    "depth": depth,
    "used": used,
    "place": Markup(_place(use, used - depth - 1, vision)),
    "resample": (meta.get("preprocessing") or {}).get("resample"),
    "epsilon": Markup(f"{usual:g}") if other else None,
    "had": Markup(f"{vision['layer_norm_eps']:g}"),
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

  folder: pathlib.Path
  config: Mapping[str, Any]
  done: Mapping[str, Mapping[str, Any]]

  @property
  def name(self) -> str:
    return self.folder.name

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
        path.parent.name: metrics.read_record(path, "kind", "metrics")
        for path in sorted(folder.parent.glob("*/done.json"))
      }
      config = files.read_object(parent / "config.json")
      return _Run(folder, config, done)
  return None


def _stages(run: _Run) -> Iterator[list[Any]]:
  """Yield the cells of the stages an artifact came through, the last first."""
  name, seen = run.name, set()
  while name in run.config and name not in seen:
    seen.add(name)
    yield _stage_cells(name, run)
    edges = run.edges(name)
    before = edges.get("init") or edges.get("vision") or ""
    if not before.startswith("@"):
      yield ["start", _code(_public(before)), *[""] * 4]
      break
    name = before[1:].partition(":")[0]


def _stage_cells(name: str, run: _Run) -> list[Any]:
  fields = run.config[name]
  if fields["kind"] != "train":
    return [name, *[""] * 5]
  rates = ", ".join(f"{_code(name)} {rate:g}" for name, rate in fields["lr"])
  data = fields["data"]
  names = [data] if isinstance(data, str) else [part[0] for part in data]
  found = ", ".join(f"{_inert(n)} ({_origin(run, n)})" for n in names)
  said = _inert(name)
  if name not in run.done:
    # The result that ships with the package was taken.
    said += f" ({_inert(fields.get('shipped') or Markup('not run here'))})"
  return [
    *(Markup(said), fields["objective"], Markup(found)),
    *(fields["batch"], fields["steps"], Markup(rates)),
  ]


def _origin(run: _Run, source: str) -> str:
  spec = run.config["sources"].get(source, {})
  path = spec.get("path")
  return (
    _inert(pathlib.PurePath(path).name)
    if path
    else f"embedded {_inert(spec.get('kind', 'data'))}"
  )


def _probes(run: _Run) -> Iterator[list[Any]]:
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
        yield [name, key, Markup(f"{found['value']:.4g}{spread}"), found["n"]]
