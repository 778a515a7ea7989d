"""Orbax, and only here: resumable training state, artifacts, addresses.

An artifact explains itself: `params/` (orbax) or `params.safetensors` (shipped
with the package), `model.json` with every choice, `tokenizer/`, and
`fingerprint.json` with a CRC32 per leaf that is verified on load. Addresses:
"DIR", "DIR:subtree", "package:NAME", "package:NAME:subtree", "hf:DIR",
"hf:DIR:subtree".
"""

import dataclasses
import importlib.metadata
import importlib.resources
import json
import logging
import pathlib
import platform
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors import numpy as safetensors_numpy

from pivot_jax import trees
from pivot_jax.convert import hf, hf_config
from pivot_jax.data import chat
from pivot_jax.errors import InputError
from pivot_jax.models import layers, mllm, qwen2, vit

LOG = logging.getLogger("pivot_jax")

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
    return _config(vit.VisionConfig, self.meta["vision"])

  @property
  def llm(self) -> qwen2.LLMConfig | None:
    return _config(qwen2.LLMConfig, self.meta["llm"])


@dataclasses.dataclass(frozen=True)
class Model:
  """A whole model ready to apply, with its tokenizer (None without one)."""

  mllm: mllm.MLLM
  params: Any
  tokenizer: chat.Tokenizer | None
  meta: dict[str, Any]


def save(path: pathlib.Path, params: Any, *, meta: Mapping[str, Any]) -> None:
  """Writes `params/`, `model.json` and `fingerprint.json` into a folder."""
  path.mkdir(parents=True, exist_ok=True)
  host = jax.device_get(params)
  with ocp.PyTreeCheckpointer() as saver:
    saver.save(path.absolute() / "params", host, force=True)
  write_json(path / "fingerprint.json", trees.fingerprint(host))
  write_json(path / "model.json", dict(meta) | {"versions": versions()})


def save_packaged(
  path: pathlib.Path, params: Any, *, meta: Mapping[str, Any]
) -> None:
  """Writes an artifact as bfloat16 safetensors, for shipping."""
  import ml_dtypes

  path.mkdir(parents=True, exist_ok=True)
  flat = {
    name: np.asarray(jax.device_get(leaf)).astype(ml_dtypes.bfloat16)
    for name, leaf in trees.flatten(params).items()
  }
  safetensors_numpy.save_file(flat, path / "params.safetensors")
  write_json(
    path / "fingerprint.json", trees.fingerprint(trees.unflatten(flat))
  )
  write_json(path / "model.json", dict(meta) | {"versions": versions()})


def load(address: str) -> Loaded:
  """Returns the parameters at an address, each leaf verified by its CRC32.

  A subtree after the last colon restores that part alone, under its own name:
  "DIR:vision" gives `{"vision": ...}`. Raises InputError naming what is missing
  or damaged.
  """
  kind, folder, part = parse(address)
  if kind == "hf":
    found, params, info = hf.load(folder)
    meta = _meta_of_hf(found, info)
    if found["vision"] and (known := hf_config.resample(folder)):
      meta["preprocessing"] = {"resample": known}
  else:
    meta = _read_meta(folder, address)
    params = _read_params(folder, part)
    _verify(folder, params, address)
    params = jax.tree.map(_float32, params)
  if part:
    inside = trees.subtree(params, part)
    params = trees.unflatten(
      {f"{part}/{name}": leaf for name, leaf in trees.flatten(inside).items()}
    )
  return Loaded(params=params, meta=meta, folder=folder)


def parse(address: str) -> tuple[str, pathlib.Path, str]:
  """Returns (kind, folder, subtree) of an address; kind is dir, package or hf."""
  kind, rest = "dir", address
  for prefix in ("package", "hf"):
    if address.startswith(prefix + ":"):
      kind, rest = prefix, address[len(prefix) + 1 :]
  for prefix in ("bv:", "timm:"):
    if address.startswith(prefix):
      raise InputError(
        f"{address}: {prefix} files are not read yet; convert to a Hugging "
        "Face folder and use hf:DIR"
      )
  name, _, part = rest.partition(":")
  if not name:
    raise InputError(f"{address!r} names no folder: give DIR or DIR:subtree")
  if kind == "package":
    root = importlib.resources.files("pivot_jax") / "assets"
    return kind, pathlib.Path(str(root)) / name, part
  return kind, pathlib.Path(name).expanduser(), part


def load_model(
  address: str,
  *,
  needs: Sequence[str] = (),
  compute: layers.Compute | None = None,
) -> Model:
  """Returns the model at an address with every part it holds.

  `needs` names what the caller cannot do without, of "vision", "projector",
  "llm" and "tokenizer"; raises InputError for the first that is not there.
  """
  loaded = load(address)
  parts = set(loaded.params)
  absent = [n for n in needs if n != "tokenizer" and n not in parts]
  if absent:
    raise InputError(
      f"{address}: holds no {absent[0]!r}, only {', '.join(sorted(parts))}; "
      "give the output of a train stage"
    )
  model = mllm.MLLM(
    llm=loaded.llm if "llm" in parts else None,
    vision=loaded.vision if "vision" in parts else None,
    compute=compute or layers.Compute(),
  )
  folder = tokenizer_folder(address)
  wanted = "tokenizer" in needs or folder.name == "tokenizer"
  tokenizer = chat.load_tokenizer(folder) if wanted else None
  return Model(model, loaded.params, tokenizer, loaded.meta)


def tokenizer_folder(address: str) -> pathlib.Path:
  """Returns the tokenizer folder of an artifact address or a plain folder."""
  _, folder, _ = parse(address)
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

  def save(self, step: int, state: Any, note: Mapping[str, Any]) -> None:
    """Commits a state; returns when it is on disk."""
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

  def restore(self, target: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """Returns (step, state, note) of the newest sound checkpoint, or None.

    `target` is a state of shapes with shardings. A damaged checkpoint is named,
    set aside as `STEP.bad`, and the one before it is taken.
    """
    for step in sorted(self._manager.all_steps(), reverse=True):
      read, problem = self._read(step, target)
      if problem is None:
        return step, read["state"], read["meta"]["note"]
      LOG.warning(
        "checkpoint %d is damaged (%s): set aside as %d.bad, trying the one "
        "before it",
        *(step, problem, step),
      )
      bad = self._folder / f"{step}.bad"
      shutil.rmtree(bad, ignore_errors=True)
      (self._folder / str(step)).rename(bad)
      self._manager.close()
      self._manager = _manager(self._folder, 2)
    return None

  def close(self) -> None:
    """Releases the manager's threads."""
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


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes JSON aside and renames it into place."""
  aside = path.with_name(path.name + ".tmp")
  text = json.dumps(content, indent=2, sort_keys=True, default=_plain)
  aside.write_text(text + "\n", encoding="utf-8")
  aside.rename(path)


def read_json(path: pathlib.Path) -> Any:
  """Returns the content of a JSON file; raises InputError naming it."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: not readable as JSON ({error})") from error


def versions() -> dict[str, str]:
  """Returns the versions of what computes and stores, for every record."""
  names = ("pivot_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
  found = {name: importlib.metadata.version(name) for name in names}
  return found | {"python": platform.python_version()}


def _manager(folder: pathlib.Path, keep: int) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep, enable_async_checkpointing=False, create=True
  )
  return ocp.CheckpointManager(folder, options=options)


def _named(state: Any) -> dict[str, Any]:
  """Returns `{key path: leaf}` of any pytree, flat."""
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


def _read_meta(folder: pathlib.Path, address: str) -> dict[str, Any]:
  path = folder / "model.json"
  if not path.exists():
    raise InputError(
      f"{address}: {folder} has no model.json, so it is no pivot_jax artifact; "
      "for a Hugging Face folder write hf:DIR"
    )
  return read_json(path)


def _read_params(folder: pathlib.Path, part: str) -> Any:
  packaged = folder / "params.safetensors"
  if packaged.exists():
    import ml_dtypes  # noqa: F401  safetensors needs it for bfloat16.

    return trees.unflatten(safetensors_numpy.load_file(packaged))
  path = folder.absolute() / "params"
  if not path.is_dir():
    raise InputError(
      f"{folder}: neither params/ nor params.safetensors is there"
    )
  try:
    with ocp.PyTreeCheckpointer() as reader:
      found = reader.metadata(path).item_metadata
      if found is None:
        raise OSError("its metadata cannot be read")
      tree = found.tree
      if part:
        top = part.split("/")[0]
        tree = {top: trees.subtree(tree, top)}
      args = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
      )
      item = jax.tree.map(lambda _: 0, tree)
      restore = ocp.args.PyTreeRestore(
        item=item, restore_args=args, partial_restore=True
      )
      return reader.restore(path, args=restore)
  except (OSError, KeyError, TypeError, RuntimeError, ValueError) as error:
    raise InputError(
      f"{path}: damaged or incomplete ({str(error).splitlines()[0]}): make the "
      "stage again, or restore the folder from a copy"
    ) from error


def _verify(folder: pathlib.Path, params: Any, address: str) -> None:
  want = read_json(folder / "fingerprint.json")
  have = trees.fingerprint(params)
  wrong = [name for name in have if want.get(name) != have[name]]
  tops = {name.split("/")[0] for name in have}
  wrong += [n for n in want if n.split("/")[0] in tops and n not in have]
  if wrong:
    raise InputError(
      f"{address}: {len(wrong)} leaves differ from fingerprint.json, first "
      f"{wrong[0]}: the files are damaged; make them again or use a copy"
    )


def _meta_of_hf(found: Mapping[str, Any], info: Mapping[str, Any]):
  def fields(config):
    return None if config is None else dataclasses.asdict(config)

  folder = str(pathlib.Path(info["source"]).absolute())
  return {
    "vision": fields(found["vision"]),
    "llm": fields(found["llm"]),
    "sources": {"all": info["source"]},
    # Where the blocks are that nobody reads, for `detach` to give back.
    "hf_vision": folder if found["vision"] else None,
    "not_carried": info["not_carried"],
  }


def _float32(leaf):
  return np.asarray(leaf).astype(np.float32)


def _plain(value):
  if isinstance(value, (np.integer, np.floating)):
    return value.item()
  if isinstance(value, pathlib.Path):
    return str(value)
  raise TypeError(f"{type(value).__name__} does not go into JSON")
