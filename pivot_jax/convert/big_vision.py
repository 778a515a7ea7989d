"""big_vision's npz files of SigLIP and SigLIP 2, in and out.

Their leaves have our layout up to a reshape: heads are an axis of their own
there. Blocks come stacked (`encoderblock`) or one by one (`encoderblock_3`);
bfloat16 is stored as two void bytes. An npz file is read member by member.
"""

import math
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import PyTree

from pivot_jax import errors, trees
from pivot_jax.convert import (
  diagnose,
  families,
  infer,
  names,
  source,
  tensors,
  towers,
)
from pivot_jax.models import vit

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
_LAYERS = "encoder/layers/"
_OURS = "Transformer/encoderblock"


def open_file(
  path: Path, *, part: str = "", choices: Mapping[str, Any] | None = None
) -> source.Source:
  """Opens the image tower of an npz file, or of a folder that holds one.

  Args:
    part: the subtree that holds it, "img" for SigLIP's files; without it
      `params/img`, `img`, `params` and the root are tried.
    choices: fields of VisionConfig that win.

  Raises:
    InputError: damaged or pickled members, or leaves that do not fit a SigLIP
      encoder: all are listed.
  """
  if path.is_dir():
    files = sorted(path.glob("*.npz"))
    if len(files) != 1:
      raise errors.InputError(
        f"{path}: holds {len(files)} npz files; name one, as bv:FILE.npz"
      )
    path = files[0]
  members = _members(path)
  root = _root(path, members, part)
  leaves = {
    name.removeprefix(f"{root}/" if root else ""): shape
    for name, shape in members.items()
    if name.startswith(f"{root}/" if root else "")
  }
  tower = {
    n: s for n, s in leaves.items() if not n.startswith(("txt/", "img/"))
  }
  config = _config(path, tower)
  config = vit.VisionConfig(**vars(config) | dict(choices or {}))
  stacked = any(name.startswith(f"{_OURS}/") for name in tower)
  pooled = any(name.startswith("MAPHead_0/") for name in tower)
  whole = _whole_shapes(config, pooled=pooled)
  wanted = _their_shapes(config, whole, stacked=stacked)
  # The position table is [1, P, D], or [P, D] as SigLIP 2 may have it.
  table = wanted["pos_embedding"]
  if tower.get("pos_embedding") == table[1:]:
    wanted["pos_embedding"] = table[1:]
  diagnose.check(
    str(path),
    missing={n: s for n, s in wanted.items() if n not in tower},
    unexpected=[f"{n} {s}" for n, s in tower.items() if n not in wanted],
    misshapen=[
      (n, tower[n], s)
      for n, s in wanted.items()
      if n in tower and tower[n] != s
    ],
    vision=config,
  )
  reader = _Reader(path, root)
  shapes = {
    p: leaf.shape
    for p, leaf in trees.flatten(source.shapes_of(config, None)).items()
  }

  def read(name: str, dtype: Any) -> np.ndarray:
    return _read_leaf(reader, name, shapes[name], dtype, stacked=stacked)

  def read_unread() -> dict[str, np.ndarray]:
    tree = {}
    for name, shape in whole.items():
      tree[name] = _read_leaf(
        reader, f"vision/{name}", shape, np.float32, stacked=stacked
      )
    arrays = names.to_foreign(trees.unflatten(tree))
    behind = {**towers.unread(config), **towers.extras(config)}
    return {name: array for name, array in arrays.items() if name in behind}

  why = "behind the layer that is read, or its pooling head"
  unread = [
    name
    for name in tower
    if name.startswith("MAPHead_0/") or name.startswith("Transformer/encoder_n")
  ]
  return source.Source(
    where=str(path),
    kind="big_vision",
    vision=config,
    llm=None,
    shapes=shapes,
    read=read,
    read_unread=read_unread,
    not_carried=tuple({"name": n, "reason": why} for n in sorted(unread)),
  )


def save(
  path: Path,
  config: vit.VisionConfig,
  vision_params: PyTree,
  *,
  unread: Mapping[str, np.ndarray] | None = None,
  dtype: str = "float32",
) -> None:
  """Writes an npz file as big_vision's SigLIP 2: `params/img/…`, stacked.

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
    for name, value in families.CHOICES["siglip"].items()
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
  kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
  found = {
    f"params/img/{_their_name(name)}": tensors.cast(name, leaf, kind).reshape(
      theirs[_their_name(name)]
    )
    for name, leaf in tree.items()
  }
  if dtype == "bfloat16":
    found = {name: array.view("V2") for name, array in found.items()}
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "wb") as file:
    np.savez(file, **found)


def _members(path: Path) -> dict[str, tuple[int, ...]]:
  """Returns {name: shape} from the headers; refuses pickled members."""
  if not path.is_file():
    raise errors.InputError(f"{path}: no such file")
  found = {}
  try:
    with zipfile.ZipFile(path) as archive:
      for entry in archive.namelist():
        with archive.open(entry) as member:
          version = np.lib.format.read_magic(member)
          read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
          )
          shape, _, dtype = read(member)
        if dtype.hasobject:
          raise errors.InputError(
            f"{path}: {entry} is a pickled object, which can run code when"
            " opened, and is not read; save arrays of numbers"
          )
        found[entry.removesuffix(".npy")] = shape
  except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
    raise errors.InputError(
      f"{path}: cannot be read as npz ({error}); copy or download it again"
    ) from error
  return found


def _root(path: Path, members: Mapping[str, Any], part: str) -> str:
  roots = [r for r in _ROOTS if not part or r.split("/")[-1] == part]
  if part and not roots:
    roots = [part, f"params/{part}"]
  for root in roots:
    if f"{root}/embedding/kernel".lstrip("/") in members:
      return root
  tops = sorted({"/".join(name.split("/")[:2]) for name in members})
  raise errors.InputError(
    f"{path}: no image tower{f' at {part!r}' if part else ''}; the file has"
    f" {', '.join(tops[:12])}: give it as bv:FILE.npz:img"
  )


def _config(path: Path, tower: Mapping[str, tuple[int, ...]]):
  """The tower of these leaves; heads are an axis of the query kernel."""
  prefix = (
    f"{_OURS}/" if f"{_OURS}/LayerNorm_0/scale" in tower else f"{_OURS}_0/"
  )
  lead = 1 if prefix == f"{_OURS}/" else 0
  try:
    *_, heads, _ = tower[f"{prefix}{_ATTENTION}/query/kernel"]
    inner = tower[f"{prefix}MlpBlock_0/Dense_0/kernel"][-1]
    side, _, _, width = tower["embedding/kernel"]
    positions = tower["pos_embedding"]
    depth = (
      tower[f"{prefix}LayerNorm_0/scale"][0]
      if lead
      else len({n.split("/")[1] for n in tower if n.startswith(f"{_OURS}_")})
    )
  except (KeyError, ValueError) as error:
    raise errors.InputError(
      f"{path}: is no SigLIP image tower of big_vision ({error}); if it is"
      " NaFlex, take a fixed-resolution one"
    ) from None
  grid = math.isqrt(positions[-2])
  if grid**2 != positions[-2]:
    raise errors.InputError(
      f"{path}: {positions[-2]} positions are no square grid of patches"
    )
  return vit.VisionConfig(
    image_size=infer.image_size(path.stem, grid, side),
    patch_size=side,
    hidden_size=width,
    intermediate_size=inner,
    num_hidden_layers=depth,
    num_attention_heads=heads,
  )


def _whole_shapes(
  config: vit.VisionConfig, *, pooled: bool
) -> dict[str, tuple[int, ...]]:
  """{path: shape} of the whole tower in our layout, with the pooling head."""
  whole = dict(towers.whole(config))
  if pooled:
    whole |= towers.extra_leaves(config)
  return whole


def _their_name(name: str) -> str:
  """The name of a leaf of ours, blocks stacked."""
  table, prefix = _STEM, ""
  if name.startswith(_LAYERS):
    table, prefix, name = _BLOCK, f"{_OURS}/", name.removeprefix(_LAYERS)
  if name in table:
    return prefix + table[name]
  module, _, leaf = name.rpartition("/")
  return f"{prefix}{table[module]}/{leaf}"


def _their_shapes(config, whole, *, stacked) -> dict[str, tuple[int, ...]]:
  """{name: shape} of big_vision's leaves for ours."""
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


class _Reader:
  """Reads members of an npz below a root, bfloat16 included."""

  def __init__(self, path: Path, root: str):
    self._path, self._root = path, root

  def __call__(self, name: str) -> np.ndarray:
    key = f"{self._root}/{name}" if self._root else name
    try:
      with np.load(self._path, allow_pickle=False) as file:
        array = file[key]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
      raise errors.InputError(
        f"{self._path}: {key} cannot be read ({error}); copy or download the"
        " file again"
      ) from error
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
      return array.view(ml_dtypes.bfloat16)
    if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
      raise errors.InputError(
        f"{self._path}: {key} is stored as {array.dtype}, not as a float"
      )
    return array


def _read_leaf(
  reader: Callable[[str], np.ndarray],
  name: str,
  shape: tuple[int, ...],
  dtype: Any,
  *,
  stacked: bool,
) -> np.ndarray:
  """One leaf of ours; a shorter stack takes the first blocks."""
  name = name.removeprefix("vision/")
  theirs = _their_name(name)
  leaf = np.empty(shape, dtype)
  if not name.startswith(_LAYERS):
    leaf[...] = reader(theirs).reshape(shape)
  elif stacked:
    leaf[...] = reader(theirs)[: shape[0]].reshape(shape)
  else:
    for layer in range(shape[0]):
      part = reader(theirs.replace(_OURS, f"{_OURS}_{layer}", 1))
      leaf[layer] = part.reshape(shape[1:])
  return leaf
