"""Weights from addresses: artifacts of ours, and published weights.

`load` reads what an address names (`addresses.py`); what model.json says of
published weights, and how they are resized, is decided here.
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from pivot_jax import addresses, sharding, trees
from pivot_jax.data import chat
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError
from pivot_jax.models import layers, mllm, qwen2, vit
from pivot_jax.weights import artifacts, model_json
from pivot_jax.weights.convert import (
  big_vision,
  hf,
  open_weights,
  positions,
  timm,
  towers,
)

LOG = logging.getLogger("pivot_jax")

_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
PARTS = ("vision", "projector", "llm")
_TABLE = "vision/embeddings/position_embedding/embedding"
# How the paper brings images to an encoder whose files do not say
# (paper.md 1.4); SigLIP's publishers differ among themselves.
_FRAMING = {"clip": "crop_bicubic", "dinov2": "crop_bicubic"}


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Parameters at an address (host, float32) and their model.json.

  `meta` is the content of model.json: `vision` and `llm` are the fields of
  VisionConfig and LLMConfig or None.
  """

  params: Any
  meta: dict[str, Any]
  folder: pathlib.Path

  @property
  def vision(self) -> vit.VisionConfig | None:
    return configs(self.meta)[0]

  @property
  def llm(self) -> qwen2.LLMConfig | None:
    return configs(self.meta)[1]

  def model(self, compute: layers.Compute | None = None) -> mllm.MLLM:
    """Return the module of the parts that are there."""
    model = mllm.MLLM(
      llm=self.llm if "llm" in self.params else None,
      vision=self.vision if "vision" in self.params else None,
      compute=compute or layers.Compute(),
    )
    return mllm.settled(model)


@dataclasses.dataclass(frozen=True)
class Model:
  """A whole model with its tokenizer (None without one).

  Leaves that come from an address are `trees.Deferred`: `sharding.place` gives
  what can be applied.
  """

  mllm: mllm.MLLM
  params: Any
  tokenizer: chat.Tokenizer | None
  meta: dict[str, Any]


def load(
  address: str,
  *,
  dtype: DTypeLike = np.float32,
  mesh: jax.sharding.Mesh | None = None,
  deferred: bool = False,
) -> Loaded:
  """Return the parameters at an address; of an artifact each leaf is verified.

  Published weights are checked whole before any is read. A subtree after the
  last colon restores that part alone, under its own name: "DIR:vision" gives
  `{"vision": ...}`.

  Args:
    dtype: of the parameters, float32 or bfloat16.
    mesh: where to place them, leaf by leaf, by the rules of `sharding.py`; host
      memory then holds few leaves at a time. None: numpy arrays.
    deferred: leaves are read when they are asked for (`trees.Deferred`). Those
      of artifacts can be read by slices; published weights, which are stacked
      and turned on the way, are read whole by each process.

  Raises:
    InputError: naming what is missing, damaged, unexpected or misshapen.
  """
  if np.dtype(dtype) not in _DTYPES:
    raise InputError(f"dtype {dtype!r}: parameters are float32 or bfloat16")
  addresses.name(address)
  where = addresses.parse(address)
  part = where.part
  if where.kind in addresses.FOREIGN:
    opened = open_address(where)
    meta, paths, read = (
      _meta(opened, address, where),
      opened.shapes,
      opened.read,
    )
    placer = {}.get
  else:
    meta, paths, read, placer = artifacts.open_folder(where.path, address)
    _check_shapes(address, meta, paths)
    meta = _with_copy(meta, where.path)
  if part:
    paths = _inside(address, part, paths)
  flat = {}
  for path in paths:
    if deferred:
      read_leaf = functools.partial(read, path, dtype)
      flat[path] = trees.Deferred(
        paths[path], np.dtype(dtype), read_leaf, placer(path)
      )
    elif mesh is None:
      flat[path] = read(path, dtype)
    else:
      leaf = read(path, dtype)
      flat[path] = sharding.place_leaf(path, leaf, mesh)
      del leaf
  return Loaded(params=trees.unflatten(flat), meta=meta, folder=where.path)


def _inside(
  address: str, part: str, paths: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
  """Return the leaves of a subtree; raise InputError if there is none."""
  try:
    trees.subtree(trees.unflatten(dict.fromkeys(paths)), part)
  except InputError:
    parts = sorted({path.split("/")[0] for path in paths})
    raise InputError(
      f"{address}: holds no {part!r}, only {', '.join(parts)}"
    ) from None
  inside = [p for p in paths if p == part or p.startswith(f"{part}/")]
  return {path: paths[path] for path in inside}


def _check_shapes(
  address: str, meta: Mapping[str, Any], paths: Mapping[str, tuple[int, ...]]
) -> None:
  """Raise InputError for parts that are not those of model.json."""
  vision, llm = configs(meta)
  tops = {path.partition("/")[0] for path in paths}
  known = {"vision": vision, "llm": llm, "projector": vision and llm}
  parts = [part for part in tops if known.get(part)]
  if not parts:
    return
  shapes = open_weights.shapes_of(vision, llm)
  found = {
    path: jax.ShapeDtypeStruct(shape, np.float32)
    for path, shape in paths.items()
    if path.partition("/")[0] in parts
  }
  wanted = {part: shapes[part] for part in parts}
  wrong = trees.diff(wanted, trees.unflatten(found))
  if wrong:
    raise InputError(
      f"{address}: the weights do not fit the model of model.json:"
      f" {'; '.join(wrong[:8])}; use a copy"
    )


def open_address(address: addresses.Address) -> open_weights.OpenWeights:
  """Open `hf:`, `bv:` and `timm:` addresses, their choices applied.

  Raises:
    InputError: as the formats do, or choices that do not go with the weights.
  """
  given = address.options
  choices = {
    field: given[name]
    for name, field in (
      ("feature_layer", "feature_layer"),
      ("final_norm", "final_norm"),
      ("tokens", "feature_tokens"),
    )
    if name in given
  }
  if address.kind == "hf":
    tower = pathlib.Path(given["tower"]) if "tower" in given else None
    opened = hf.open_folder(address.path, choices=choices, tower=tower)
  elif address.kind == "bv":
    opened = big_vision.open_file(
      address.path, inside=address.inside, choices=choices
    )
  else:
    opened = timm.open_file(address.path, choices=choices)
  if opened.vision is None and given.keys() - {"revision"}:
    raise InputError(
      f"{opened.where}: has no encoder, which the choices are of"
    )
  if "image_size" in given or "positions" in given:
    opened = _resized(opened, given.get("image_size"), given.get("positions"))
  return opened


def unread(
  meta: Mapping[str, Any], *, source: str | None = None
) -> tuple[dict[str, np.ndarray] | None, dict[str, Any] | None]:
  """Return the published tower's tensors that an artifact does not carry.

  They are read from the address the artifact names, if a person named that one
  too (`addresses.is_named`); else from the artifact's own copy. `source` is
  read instead where that has moved, was not named, or came without some of them
  (an encoder cut out of an MLLM by others). With them comes what model.json
  says of them. None and None: the encoder never had any.

  Raises:
    InputError: no address was named, or it cannot be read, or holds other
      tensors, or not all.
  """
  known = meta.get("unread")
  if known is None and source is None:
    return None, None
  vision = meta["vision"]
  # What is not read depends on the layer that is.
  layer = {k: vision[k] for k in ("feature_layer", "final_norm")}

  def read(address: str) -> dict[str, np.ndarray]:
    LOG.info("what was not trained is read from %s", address)
    where = addresses.parse(address)
    where = where._replace(options=layer | where.options)
    return open_address(where).read_unread()

  if known is None:
    arrays = read(source)
    return arrays, _describe(source, arrays, vision)
  if known["absent"]:
    return _with_absent(known, source, read, vision)
  address = source or _named_of(known)
  try:
    arrays = read(address)
  except InputError as error:
    raise InputError(
      f"what was not trained ({', '.join(known['modules'])}) comes from"
      f" {address}: {error}; put it back, or at export say where it is now"
      " (--source=ADDRESS)"
    ) from error
  if address == known.get("copy"):
    # transformers' classes want some modules that the original may not have had.
    arrays = _of(known, arrays)
  found = _describe(address, arrays, vision)
  if known["fingerprint"] != found["fingerprint"]:
    raise InputError(
      f"{address}: is not what the encoder came from: the tensors behind the"
      " features have another fingerprint; give the original (--source=ADDRESS)"
    )
  return arrays, known if address == known.get("copy") else found


def _named_of(known: Mapping[str, Any]) -> str:
  """Return the address, or the copy, that was named."""
  for address in (known["address"], known.get("copy")):
    if address and addresses.is_named(address):
      return address
  raise InputError(
    f"what was not trained ({', '.join(known['modules'])}) is said to come from"
    f" {known['address']}, which nobody named, so it is not read: at export say"
    f" --source={known['address']} if you trust it, in a config add it to the"
    f" stage's inputs, as source={known['address']!r}"
  )


def _with_copy(meta: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  """Return model.json, noting that the artifact's folder has a whole encoder."""
  if not meta.get("unread") or not (folder / "hf" / "config.json").exists():
    return meta
  copy = {"copy": f"hf:{folder.absolute() / 'hf'}"}
  return meta | {"unread": meta["unread"] | copy}


def _with_absent(known, source, read, vision):
  """Return the tensors of weights that came without some.

  The rest is read from `source`.
  """
  if source is None:
    raise InputError(
      f"{known['address']}: came without {', '.join(known['absent'])}, which are"
      " not read but belong to the encoder: put the encoder's folder where"
      " mm_vision_tower says, or at export give it as --source=ADDRESS"
    )
  arrays = read(source)
  if _print(_of(known, arrays)) != known["fingerprint"]:
    arrays |= read(_named_of(known))
  return arrays, _describe(source, arrays, vision)


def _of(known, arrays) -> dict[str, np.ndarray]:
  return {k: v for k, v in arrays.items() if _module(k) in known["modules"]}


def load_model(
  address: str,
  *,
  needs: Sequence[str] = (),
  compute: layers.Compute | None = None,
) -> Model:
  """Return the model at an address with every part it holds.

  `needs` names what the caller cannot do without, of "vision", "projector",
  "llm" and "tokenizer"; raises InputError for the first that is not there.
  """
  loaded = load(address, deferred=True)
  check_parts(address, loaded, needs)
  folder = addresses.tokenizer_folder(address)
  wanted = "tokenizer" in needs or folder.name == "tokenizer"
  tokenizer = load_tokenizer(folder) if wanted else None
  return Model(loaded.model(compute), loaded.params, tokenizer, loaded.meta)


def check_parts(address: str, loaded: Loaded, needs: Sequence[str]) -> None:
  """Raise InputError for the first part of `needs` that is not there.

  A tokenizer among them is not looked for.
  """
  parts = set(loaded.params)
  absent = [n for n in needs if n != "tokenizer" and n not in parts]
  if absent:
    raise InputError(
      f"{address}: holds no {absent[0]!r}, only {', '.join(sorted(parts))}; "
      "give a model that has it, as the output of a train stage"
    )


def configs(
  meta: Mapping[str, Any],
) -> tuple[vit.VisionConfig | None, qwen2.LLMConfig | None]:
  """Return the configurations that model.json holds."""
  return model_json.configs(meta)


def resample(meta: Mapping[str, Any]) -> str | None:
  """Return how images are framed by model.json, None if it does not say."""
  return (meta.get("preprocessing") or {}).get("resample")


def _resized(opened, image_size, method) -> open_weights.OpenWeights:
  """Return the weights with positions resized to another image size."""
  if image_size is None or method is None:
    raise InputError(
      f"{opened.where}: another image size needs both choices, as"
      " ?image_size=378&positions=dinov2 (or big_vision)"
    )
  positions.check_method(method)
  vision = opened.vision
  if image_size < vision.patch_size:
    raise InputError(
      f"{opened.where}: image_size={image_size} is less than a patch of"
      f" {vision.patch_size}"
    )
  smaller = dataclasses.replace(vision, image_size=image_size)
  LOG.info(
    "%s: positions resized from %d x %d to %d x %d patches, as %s does",
    *(opened.where, vision.grid, vision.grid, smaller.grid, smaller.grid),
    method,
  )

  def table(dtype: Any) -> np.ndarray:
    whole = opened.read(_TABLE, np.float32)
    resized = positions.resize(
      whole, smaller.grid, method=method, class_token=vision.class_token
    )
    return resized.astype(dtype)

  shapes = dict(opened.shapes)
  shapes[_TABLE] = (smaller.positions, vision.hidden_size)
  return dataclasses.replace(
    opened,
    vision=smaller,
    shapes=shapes,
    read=lambda path, dtype: (
      table(dtype) if path == _TABLE else opened.read(path, dtype)
    ),
  )


def _meta(
  opened: open_weights.OpenWeights, address: str, where: addresses.Address
) -> dict[str, Any]:
  """Return what model.json says of published weights."""

  def fields(config):
    return None if config is None else dataclasses.asdict(config)

  meta = {
    "vision": fields(opened.vision),
    "llm": fields(opened.llm),
    "sources": {"all": address},
    "not_carried": list(opened.not_carried),
    "unread": None,
  }
  if opened.vision is None or where.part in ("llm", "projector"):
    return meta
  # Where the tensors are that nobody reads, to be given back.
  behind = opened.read_unread()
  found = _describe(where.origin, behind, meta["vision"])
  if behind or found["absent"]:
    meta["unread"] = found
  framing = _framing(opened)
  if framing:
    meta["preprocessing"] = {"resample": framing}
  return meta


def _framing(opened: open_weights.OpenWeights) -> str | None:
  """Return how images are brought to the encoder, None if nobody says.

  A processor for another size than the encoder's keeps its filter; the shortest
  edge is then the encoder's size, as the paper has it for DINOv2.
  """
  vision, known = opened.vision, opened.processor
  if vision is None:
    return None
  if known is None:
    if vision.family in ("vit", "vit_mae"):
      return f"crop_bicubic:{int(vision.image_size / 0.9)}"
    return _FRAMING.get(vision.family)
  if known.size == vision.image_size:
    return known.resample
  plain = known.resample.partition(":")[0]
  LOG.info(
    "%s: its processor makes images of %d pixels, the encoder reads %d: they are"
    " framed by %s",
    *(opened.where, known.size, vision.image_size, plain),
  )
  return plain


def _describe(
  address: str, behind: Mapping[str, Any], vision: Mapping[str, Any]
) -> dict[str, Any]:
  """Return the entry of model.json on tensors that are not carried."""
  config, _ = model_json.configs({"vision": vision, "llm": None})
  assert config is not None
  wanted = towers.unread(config)
  return {
    "address": address,
    "fingerprint": _print(behind),
    "modules": sorted({_module(name) for name in behind}),
    "absent": sorted({_module(name) for name in wanted if name not in behind}),
  }


def _print(arrays: Mapping[str, Any]) -> str:
  return trees.digest(trees.fingerprint(arrays))


def _module(name: str) -> str:
  """Return the block, norm or head that a tensor of a tower belongs to."""
  parts = name.split(".")
  return ".".join(parts[:3] if parts[0] == "encoder" else parts[:1])
