"""big_vision's npz files of SigLIP and SigLIP 2, in and out.

Their leaves have our layout up to a reshape: heads are an axis of their own
there. Blocks come stacked (`encoderblock`) or one by one (`encoderblock_3`);
bfloat16 is stored as two void bytes. An npz file is read member by member.
"""

import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from pivot_jax import errors, files, trees
from pivot_jax.models import vit
from pivot_jax.weights.convert import (
  names,
  open_weights,
  safetensor_files,
  towers,
)

_ATTENTION = "MultiHeadDotProductAttention_0"
_ROOTS = ("params/img", "img", "params", "")
# Ours to theirs; a module's leaves keep their names.
_STEM = {
  "embeddings/patch_embedding": "embedding",
  "embeddings/position_embedding/embedding": "pos_embedding",
  "post_layernorm": "Transformer/encoder_norm",
  "head/probe": "MAPHead_0/probe",
  "head/layernorm": "MAPHead_0/LayerNorm_0",
  "head/mlp/fc1": "MAPHead_0/MlpBlock_0/Dense_0",
  "head/mlp/fc2": "MAPHead_0/MlpBlock_0/Dense_1",
  **{
    f"head/attention/{ours}": f"MAPHead_0/{_ATTENTION}/{theirs}"
    for ours, theirs in (
      ("q_proj", "query"),
      ("k_proj", "key"),
      ("v_proj", "value"),
      ("out_proj", "out"),
    )
  },
}
_BLOCK = {
  "layer_norm1": "LayerNorm_0",
  "layer_norm2": "LayerNorm_1",
  "self_attn/q_proj": f"{_ATTENTION}/query",
  "self_attn/k_proj": f"{_ATTENTION}/key",
  "self_attn/v_proj": f"{_ATTENTION}/value",
  "self_attn/out_proj": f"{_ATTENTION}/out",
  "mlp/fc1": "MlpBlock_0/Dense_0",
  "mlp/fc2": "MlpBlock_0/Dense_1",
}
# RuntimeError: a member is encrypted, or compressed as zipfile cannot. Of a
# header that is no literal numpy raises what Python's own reader does.
_PROBLEMS = (
  *(zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError),
  *(RuntimeError, KeyError, MemoryError, TypeError),
  *(SyntaxError, tokenize.TokenError),
)
_LAYERS = "encoder/layers/"
_OURS = "Transformer/encoderblock"


def open_file(
  path: Path, *, inside: str = "", choices: Mapping[str, Any] | None = None
) -> open_weights.OpenWeights:
  """Open the image tower of an npz file, or of a folder that holds one.

  Args:
    path: the file or folder.
    inside: the subtree that holds it, "img" for SigLIP's files; without it
      `params/img`, `img`, `params` and the root are tried.
    choices: fields of VisionConfig that win.

  Raises:
    InputError: damaged or pickled members, or leaves that do not fit a SigLIP
      encoder: all are listed.
  """
  file = _open(path, inside)
  config = _config(file)
  config = vit.VisionConfig(**vars(config) | dict(choices or {}))
  whole = dict(towers.whole(config))
  if any(name.startswith("MAPHead_0/") for name in file.members):
    whole |= towers.extra_leaves(config)
  _check(file, config, whole)
  shapes = {
    name: leaf.shape
    for name, leaf in trees.flatten(
      open_weights.shapes_of(config, None)
    ).items()
  }

  def read(name: str, dtype: DTypeLike) -> np.ndarray:
    leaf = np.empty(shapes[name], dtype)
    _fill(leaf, file, name.removeprefix("vision/"))
    return leaf

  why = "behind the layer that is read, or its pooling head"
  ours = {name.removeprefix("vision/"): s for name, s in shapes.items()}
  carried = _their_shapes(config, ours, stacked=file.stacked)
  return open_weights.OpenWeights(
    where=str(file.path),
    kind="big_vision",
    vision=config,
    llm=None,
    shapes=shapes,
    read=read,
    read_unread=lambda: _read_unread(file, config.used_layers, whole, ours),
    not_carried=tuple(
      {"name": name, "reason": why}
      for name in sorted(file.members.keys() - carried.keys())
    ),
  )


def _read_unread(file, used, whole, ours) -> dict[str, np.ndarray]:
  """Return the blocks from number `used` on, and the leaves not in `ours`."""
  flat = {}
  for name, shape in whole.items():
    if name.startswith(_LAYERS):
      shape = (shape[0] - used, *shape[1:])
    if name in ours and not (name.startswith(_LAYERS) and shape[0]):
      continue
    flat[name] = np.empty(shape, np.float32)
    _fill(flat[name], file, name, first=used)

  def number(match: re.Match) -> str:
    return f"encoder.layers.{int(match[1]) + used}."

  return {
    re.sub(r"^encoder\.layers\.(\d+)\.", number, name): array
    for name, array in names.to_foreign(trees.unflatten(flat)).items()
  }


def save(
  path: Path,
  config: vit.VisionConfig,
  vision_params: PyTree,
  *,
  unread: Mapping[str, np.ndarray] | None = None,
  dtype: str = "float32",
) -> None:
  """Write an npz file as big_vision's SigLIP 2: `params/img/…`, stacked.

  bfloat16 is stored as big_vision stores it, as two void bytes.

  Raises:
    InputError: an encoder that big_vision's SigLIP is not.
  """
  if config.family != "siglip":
    raise errors.InputError(
      f"big_vision's format is SigLIP's, and this is a {config.family} encoder;"
      " use hf or timm"
    )
  # A file has no config: what reads it takes these as given.
  other = [
    f"{name} is {vars(config)[name]!r}, not {value!r}"
    for name, value in towers.CHOICES["siglip"].items()
    if vars(config)[name] != value
  ]
  if other:
    raise errors.InputError(
      f"big_vision's format cannot say that {'; '.join(other)}; use hf"
    )
  arrays = towers.complete(config, vision_params, unread)
  tree = trees.flatten(towers.as_tree(arrays, config))
  shapes = {name: leaf.shape for name, leaf in tree.items()}
  theirs = _their_shapes(config, shapes, stacked=True)
  kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
  found = {
    f"params/img/{_their_name(name)}": safetensor_files.cast(
      name, leaf, kind
    ).reshape(theirs[_their_name(name)])
    for name, leaf in tree.items()
  }
  if dtype == "bfloat16":
    found = {name: array.view("V2") for name, array in found.items()}
  files.make_folder(path.parent)
  files.save_arrays(path, found)


class _File(NamedTuple):
  """The tower in an npz file: its leaves below `root`, shape and dtype each."""

  path: Path
  root: str
  members: Mapping[str, tuple[tuple[int, ...], np.dtype]]

  @property
  def stacked(self) -> bool:
    return any(name.startswith(f"{_OURS}/") for name in self.members)

  def read(self, name: str) -> np.ndarray:
    key = f"{self.root}/{name}" if self.root else name
    try:
      with np.load(self.path, allow_pickle=False) as file:
        array = file[key]
    except _PROBLEMS as error:
      raise errors.InputError(
        f"{self.path}: {key} cannot be read ({error}); copy or download the"
        " file again"
      ) from error
    return array.view(ml_dtypes.bfloat16) if _is_void(array.dtype) else array


def _open(path: Path, inside: str) -> _File:
  """Read the headers of a file; refuse pickled members."""
  if path.is_dir():
    found = sorted(path.glob("*.npz"))
    if len(found) != 1:
      raise errors.InputError(
        f"{path}: holds {len(found)} npz files; name one, as bv:FILE.npz"
      )
    path = found[0]
  if not path.is_file():
    raise errors.InputError(f"{path}: no such file")
  members = {}
  try:
    with zipfile.ZipFile(path) as archive:
      for entry in archive.namelist():
        members[entry.removesuffix(".npy")] = _header(archive, entry)
  except _PROBLEMS as error:
    raise errors.InputError(
      f"{path}: cannot be read as npz ({error}); copy or download it again"
    ) from error
  objects = [name for name, (_, dtype) in members.items() if dtype.hasobject]
  if objects:
    raise errors.InputError(
      f"{path}: {', '.join(objects)} is a pickled object, which can run code when"
      " opened, and is not read; save arrays of numbers"
    )
  root = _root(path, members, inside)
  below = {
    name.removeprefix(f"{root}/" if root else ""): what
    for name, what in members.items()
    if name.startswith(f"{root}/" if root else "")
  }
  tower = {
    n: what for n, what in below.items() if not n.startswith(("txt/", "img/"))
  }
  return _File(path, root, tower)


def _header(archive: zipfile.ZipFile, entry: str):
  """Return the shape and dtype of a member."""
  with archive.open(entry) as member:
    version = np.lib.format.read_magic(member)
    read = (
      np.lib.format.read_array_header_1_0
      if version == (1, 0)
      else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(member)
  return shape, dtype


def _is_void(dtype: np.dtype) -> bool:
  """Two bytes without a type are a bfloat16."""
  return dtype.kind == "V" and dtype.itemsize == 2


def _root(path: Path, members: Mapping[str, Any], inside: str) -> str:
  roots = [r for r in _ROOTS if not inside or r.split("/")[-1] == inside]
  if inside and not roots:
    roots = [inside, f"params/{inside}"]
  for root in roots:
    if f"{root}/embedding/kernel".lstrip("/") in members:
      return root
  tops = sorted({"/".join(name.split("/")[:2]) for name in members})
  raise errors.InputError(
    f"{path}: no image tower{f' at {inside!r}' if inside else ''}; the file has"
    f" {', '.join(tops[:12])}: give it as bv:FILE.npz:img"
  )


def _config(file: _File) -> vit.VisionConfig:
  """Return the tower of these leaves; heads are an axis of the query kernel."""
  tower = {name: shape for name, (shape, _) in file.members.items()}
  prefix = f"{_OURS}/" if file.stacked else f"{_OURS}_0/"
  try:
    *_, heads, _ = tower[f"{prefix}{_ATTENTION}/query/kernel"]
    inner = tower[f"{prefix}MlpBlock_0/Dense_0/kernel"][-1]
    side, _, _, width = tower["embedding/kernel"]
    positions = tower["pos_embedding"][-2]
    depth = (
      tower[f"{prefix}LayerNorm_0/scale"][0]
      if file.stacked
      else len({n.split("/")[1] for n in tower if n.startswith(f"{_OURS}_")})
    )
  except (KeyError, ValueError, IndexError) as error:
    raise errors.InputError(
      f"{file.path}: is no SigLIP image tower of big_vision ({error}); if it is"
      " NaFlex, take a fixed-resolution one"
    ) from None
  grid = math.isqrt(max(0, positions))
  if grid**2 != positions or not grid or side < 1:
    raise errors.InputError(
      f"{file.path}: {positions} positions are no square grid of patches"
    )
  try:
    return vit.VisionConfig(
      image_size=towers.image_size(file.path.stem, grid, side),
      patch_size=side,
      hidden_size=width,
      intermediate_size=inner,
      num_hidden_layers=depth,
      num_attention_heads=heads,
    )
  except errors.InputError as error:
    raise errors.InputError(f"{file.path}: {error}") from error


def _check(file: _File, config: vit.VisionConfig, whole) -> None:
  """Raise InputError unless the leaves are those of the whole tower."""
  wanted = _their_shapes(config, whole, stacked=file.stacked)
  tower = {name: shape for name, (shape, _) in file.members.items()}
  # The position table is [1, P, D], or [P, D] as SigLIP 2 may have it.
  table = wanted["pos_embedding"]
  if tower.get("pos_embedding") == table[1:]:
    wanted["pos_embedding"] = table[1:]
  open_weights.check(
    str(file.path),
    missing={n: s for n, s in wanted.items() if n not in tower},
    unexpected=[f"{n} {s}" for n, s in tower.items() if n not in wanted],
    misshapen=[
      (n, tower[n], s)
      for n, s in wanted.items()
      if n in tower and tower[n] != s
    ],
    vision=config,
    not_floats=[
      f"{name} {dtype}"
      for name, (_, dtype) in file.members.items()
      if dtype.kind != "f" and not _is_void(dtype)
    ],
  )


def _their_name(name: str) -> str:
  """Return the name of a leaf of ours, blocks stacked."""
  table, prefix = _STEM, ""
  if name.startswith(_LAYERS):
    table, prefix, name = _BLOCK, f"{_OURS}/", name.removeprefix(_LAYERS)
  if name in table:
    return prefix + table[name]
  module, _, leaf = name.rpartition("/")
  return f"{prefix}{table[module]}/{leaf}"


def _their_shapes(config, whole, *, stacked) -> dict[str, tuple[int, ...]]:
  """Return {name: shape} of big_vision's leaves for ours."""
  heads = config.num_attention_heads
  found = {}
  for name, shape in whole.items():
    shape = _split_heads(name, shape, heads)
    if name == "embeddings/position_embedding/embedding":
      shape = (1, *shape)
    theirs = _their_name(name)
    if stacked or not name.startswith(_LAYERS):
      found[theirs] = shape
      continue
    for layer in range(shape[0]):
      found[theirs.replace(_OURS, f"{_OURS}_{layer}", 1)] = shape[1:]
  return found


def _split_heads(name, shape, heads):
  """Attention kernels are [D, A, H] in and [A, H, D] out, in-biases [A, H]."""
  if re.search(r"/[qkv]_proj/(kernel|bias)$", name):
    return (*shape[:-1], heads, shape[-1] // heads)
  if name.endswith("out_proj/kernel"):
    return (*shape[:-2], heads, shape[-2] // heads, shape[-1])
  return shape


def _fill(leaf: np.ndarray, file: _File, name: str, *, first: int = 0) -> None:
  """Read a leaf of ours; of blocks as many as it holds, from `first` on."""
  theirs = _their_name(name)
  if not name.startswith(_LAYERS):
    leaf[...] = file.read(theirs).reshape(leaf.shape)
    return
  if file.stacked:
    blocks = file.read(theirs)[first : first + len(leaf)]
    leaf[...] = blocks.reshape(leaf.shape)
    return
  for layer in range(len(leaf)):
    one = theirs.replace(_OURS, f"{_OURS}_{first + layer}", 1)
    leaf[layer] = file.read(one).reshape(leaf.shape[1:])
