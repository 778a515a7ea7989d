"""Weights from addresses, and the resumable state of a training.

`load` gives what an address names (`addresses.py`): an artifact of ours, or
published weights. `Resumable` keeps the checkpoints of a training.
"""

import dataclasses
import functools
import logging
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from pivot_jax import addresses, sharding, trees
from pivot_jax.data import chat
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError
from pivot_jax.models import layers, mllm, qwen2, vit
from pivot_jax.weights import artifacts
from pivot_jax.weights.convert import open_weights, source, towers

LOG = logging.getLogger("pivot_jax")

_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
PARTS = ("vision", "projector", "llm")


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What an address gives: parameters (host, float32) and what they are.

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
      memory then holds one leaf at a time. None: numpy arrays.
    deferred: leaves are read when they are asked for (`trees.Deferred`).

  Raises:
    InputError: naming what is missing, damaged, unexpected or misshapen.
  """
  if np.dtype(dtype) not in _DTYPES:
    raise InputError(f"dtype {dtype!r}: parameters are float32 or bfloat16")
  where = addresses.parse(address)
  part = where.part
  if where.kind in addresses.FOREIGN:
    opened = open_weights.open_address(where)
    meta, paths, read = (
      _meta(opened, address, where),
      opened.shapes,
      opened.read,
    )
  else:
    meta, paths, read = artifacts.open_folder(where.path, address)
  if part:
    try:
      trees.subtree(trees.unflatten(dict.fromkeys(paths)), part)
    except InputError:
      parts = sorted({path.split("/")[0] for path in paths})
      raise InputError(
        f"{address}: holds no {part!r}, only {', '.join(parts)}"
      ) from None
    inside = [p for p in paths if p == part or p.startswith(f"{part}/")]
    paths = {path: paths[path] for path in inside}
  flat = {}
  for path in paths:
    if deferred:
      read_leaf = functools.partial(read, path, dtype)
      flat[path] = trees.Deferred(paths[path], np.dtype(dtype), read_leaf)
    elif mesh is None:
      flat[path] = read(path, dtype)
    else:
      leaf = read(path, dtype)
      flat[path] = sharding.place_leaf(path, leaf, mesh)
      del leaf
  return Loaded(params=trees.unflatten(flat), meta=meta, folder=where.path)


def unread(
  meta: Mapping[str, Any], *, source: str | None = None
) -> tuple[dict[str, np.ndarray] | None, dict[str, Any] | None]:
  """Return the published tower's tensors that an artifact does not carry.

  They are read from the address the artifact names, or from `source` if that
  has moved or came without some of them (an encoder cut out of an MLLM by
  others). With them comes what model.json says of them. None and None: the
  encoder never had any.

  Raises:
    InputError: the address cannot be read, or holds other tensors, or not all.
  """
  known = meta.get("unread")
  if known is None and source is None:
    return None, None
  vision = meta["vision"]
  # What is not read depends on the layer that is.
  layer = {k: vision[k] for k in ("feature_layer", "final_norm")}

  def read(address: str) -> dict[str, np.ndarray]:
    where = addresses.parse(address)
    where = where._replace(options=layer | where.options)
    return open_weights.open_address(where).read_unread()

  if known is None:
    arrays = read(source)
    return arrays, _describe(source, arrays, vision)
  if known["absent"]:
    return _with_absent(known, source, read, vision)
  address = source or known["address"]
  try:
    arrays = read(address)
  except InputError as error:
    raise InputError(
      f"what was not trained ({', '.join(known['modules'])}) comes from"
      f" {address}: {error}; put it back, or at export say where it is now"
      " (--source=ADDRESS)"
    ) from error
  found = _describe(address, arrays, vision)
  if known["fingerprint"] != found["fingerprint"]:
    raise InputError(
      f"{address}: is not what the encoder came from: the tensors behind the"
      " features have another fingerprint; give the original (--source=ADDRESS)"
    )
  return arrays, found


def _with_absent(known, source, read, vision):
  """The tensors of weights that came without some, the rest from `source`."""
  if source is None:
    raise InputError(
      f"{known['address']}: came without {', '.join(known['absent'])}, which are"
      " not read but belong to the encoder: put the encoder's folder where"
      " mm_vision_tower says, or at export give it as --source=ADDRESS"
    )
  arrays = read(source) | read(known["address"])
  return arrays, _describe(source, arrays, vision)


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
  parts = set(loaded.params)
  absent = [n for n in needs if n != "tokenizer" and n not in parts]
  if absent:
    raise InputError(
      f"{address}: holds no {absent[0]!r}, only {', '.join(sorted(parts))}; "
      "give the output of a train stage"
    )
  folder = tokenizer_folder(address)
  wanted = "tokenizer" in needs or folder.name == "tokenizer"
  tokenizer = load_tokenizer(folder) if wanted else None
  return Model(loaded.model(compute), loaded.params, tokenizer, loaded.meta)


def configs(
  meta: Mapping[str, Any],
) -> tuple[vit.VisionConfig | None, qwen2.LLMConfig | None]:
  """Return the configurations that model.json holds."""
  return (
    _config(vit.VisionConfig, meta["vision"]),
    _config(qwen2.LLMConfig, meta["llm"]),
  )


def resample(meta: Mapping[str, Any]) -> str | None:
  """Return how images are framed by model.json, None if it does not say."""
  return (meta.get("preprocessing") or {}).get("resample")


def tokenizer_folder(address: str) -> pathlib.Path:
  """Return the tokenizer folder of an artifact address or a plain folder."""
  folder = addresses.parse(address).path
  nested = folder / "tokenizer"
  return nested if nested.is_dir() else folder


class Resumable:
  """Committed checkpoints of a running training, newest verified first.

  Each holds the trainable parameters, optimizer state, step, examples seen and
  random key, with a CRC32 per leaf. Frozen parameters are not in it: they come,
  verified, from the stage's inputs.
  """

  def __init__(self, folder: pathlib.Path, *, keep: int = 2):
    self._folder = folder.absolute()
    self._manager = _manager(self._folder, keep)

  def save(self, step: int, state: PyTree, note: Mapping[str, Any]) -> None:
    """Commit a state; returns when it is on disk."""
    _check_free(self._folder, state)
    crcs = trees.fingerprint(_named(jax.device_get(state)))
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        meta=ocp.args.JsonSave({"crc": crcs, "note": dict(note)}),
      ),
    )
    self._manager.wait_until_finished()

  def restore(self, target: PyTree) -> tuple[int, Any, dict[str, Any]] | None:
    """Return (step, state, note) of the newest sound checkpoint, or None.

    `target` is a state of shapes with shardings. None: there is no checkpoint. A
    damaged one is named, set aside as `STEP.bad`, and the one before it is taken.

    Raises:
      InputError: every checkpoint is damaged; nothing is set aside.
    """
    damaged: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      read, problem = self._read(step, target)
      if problem is None:
        self._set_aside(damaged)
        return step, read["state"], read["meta"]["note"]
      damaged[step] = problem
    listed = [f"{step} ({problem})" for step, problem in damaged.items()]
    listed += sorted(path.name for path in self._folder.glob("*.bad"))
    if listed:
      raise InputError(
        f"{self._folder}: every checkpoint is damaged: {'; '.join(listed)}; put "
        f"a copy of one back, or delete {self._folder} to begin at step 0"
      )
    return None

  def _set_aside(self, damaged: Mapping[int, str]) -> None:
    for step, problem in damaged.items():
      LOG.warning(
        "checkpoint %d is damaged (%s): set aside as %d.bad, the one before it "
        "is taken",
        *(step, problem, step),
      )
      bad = self._folder / f"{step}.bad"
      shutil.rmtree(bad, ignore_errors=True)
      (self._folder / str(step)).rename(bad)
    if damaged:
      self._manager.close()
      self._manager = _manager(self._folder, 2)

  def close(self) -> None:
    """Release the manager's threads."""
    self._manager.close()

  def _read(self, step: int, target: Any) -> tuple[Any, str | None]:
    try:
      read = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()
        ),
      )
    # Orbax raises a bare Exception where an array's file is missing.
    except Exception as error:  # noqa: BLE001
      return None, str(error).splitlines()[0]
    have = trees.fingerprint(_named(jax.device_get(read["state"])))
    want = read["meta"]["crc"]
    wrong = sorted(
      name
      for name in want.keys() | have.keys()
      if want.get(name) != have.get(name)
    )
    return read, f"leaf {wrong[0]}: CRC32 differs" if wrong else None


def _manager(folder: pathlib.Path, keep: int) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep, enable_async_checkpointing=False, create=True
  )
  return ocp.CheckpointManager(folder, options=options)


def _named(state: Any) -> dict[str, Any]:
  """Return `{key path: leaf}` of any pytree, flat."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }


def _check_free(folder: pathlib.Path, state: Any) -> None:
  need = 1.2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  free = shutil.disk_usage(folder).free
  if free < need:
    raise InputError(
      f"{folder}: {free / 1e9:.2f} GB free but a checkpoint needs "
      f"{need / 1e9:.2f} GB: free some space and run the same command again"
    )


def _config(kind, fields):
  if fields is None:
    return None
  tupled = {
    k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
  }
  return kind(**tupled)


def _meta(
  opened: source.Source, address: str, where: addresses.Address
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
  framing = open_weights.framing(opened)
  if framing:
    meta["preprocessing"] = {"resample": framing}
  return meta


def _describe(
  address: str, behind: Mapping[str, Any], vision: Mapping[str, Any]
) -> dict[str, Any]:
  """What model.json says of the tensors that are not carried."""
  wanted = towers.unread(_config(vit.VisionConfig, vision))
  return {
    "address": address,
    "fingerprint": trees.digest(trees.fingerprint(behind)),
    "modules": sorted({_module(name) for name in behind}),
    "absent": sorted({_module(name) for name in wanted if name not in behind}),
  }


def _module(name: str) -> str:
  """The block, norm or head that a tensor of a tower belongs to."""
  parts = name.split(".")
  return ".".join(parts[:3] if parts[0] == "encoder" else parts[:1])
