"""Compares the processes of a run, before it begins: settings, files, versions.

A process with another setting, another file or another version would train along
and spoil the result of all, without an error.
"""

import contextlib
import hashlib
import json
import pathlib
import secrets
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence

import jax
from ml_collections import ConfigDict

from pivot_jax import addresses, files, names, processes
from pivot_jax.data import opener, rows
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError
from pivot_jax.recipe.inputs import Step, own_names

# Seconds in which what the first process wrote is seen by all.
_SEEN = 60


def check(steps: Sequence[Step], config: ConfigDict, plan: str) -> None:
  """Raise InputError, in all processes, where they differ; of one, return.

  Compared are the settings by name, the source files of the package and of the
  user's own code, the plan, tokenizers, the rows of files, and the versions of
  what computes.
  """
  if processes.count() == 1:
    return
  processes.agree("config", _flat(config))
  processes.agree("versions", _versions())
  processes.agree("source files", _source_files(steps))
  processes.agree("the plan", {"plan.txt": plan})
  processes.agree("tokenizer", _tokenizers(steps))
  processes.agree("data", _data(steps))


def check_shared(workdir: pathlib.Path, *, seconds: float = _SEEN) -> None:
  """Raise InputError, in all processes, unless all see one work folder.

  The first writes a file that the others look for. The folder has to exist.
  """
  if processes.count() == 1:
    return
  place = workdir / "shared"

  def write() -> str:
    token = secrets.token_hex(8)
    files.write_text(place, token)
    return token

  token = processes.decide("workdir", write)
  until = time.monotonic() + seconds
  while not (seen := _read(place) == token) and time.monotonic() < until:
    time.sleep(0.2)
  blind = [
    number
    for number, sees in enumerate(processes.exchange("workdir", seen))
    if not sees
  ]
  if processes.first():
    place.unlink(missing_ok=True)
  if blind:
    listed = ", ".join(map(str, blind))
    raise InputError(
      f"process {listed} does not see {workdir} as process 0 does: give a "
      "folder that all hosts share, as --workdir"
    )


def marks(step: Step) -> dict[str, str]:
  """Return by path what tells the results apart that a stage reads."""
  if processes.count() == 1:
    return {}
  places = [
    addresses.parse(address).path / name
    for address in step.inputs.values()
    for name in ("done.json", "fingerprint.json")
  ]
  return {str(x): _hash(x) for x in places if x.exists()}


def wait_for(
  step: Step, seen: Mapping[str, str], *, seconds: float = _SEEN
) -> None:
  """Wait until this process sees the results that the first one does.

  A shared disk may show for a while what was there before.

  Raises:
    InputError: it does not, in all that time.
  """
  until = time.monotonic() + seconds
  for path, mark in seen.items():
    place = pathlib.Path(path)
    while (found := _hash(place)) != mark and time.monotonic() < until:
      time.sleep(0.5)
      # Listing a folder asks the disk anew.
      with contextlib.suppress(OSError):
        list(place.parent.iterdir())
    if found != mark:
      raise InputError(
        f"{step.name}: process {processes.index()} does not see {path} as "
        f"process 0 wrote it, after {seconds:.0f} s: give a --workdir that all "
        "hosts share"
      )


def _hash(place: pathlib.Path) -> str:
  try:
    return hashlib.sha256(place.read_bytes()).hexdigest()[:16]
  except OSError:
    return ""


def _read(place: pathlib.Path) -> str:
  try:
    return files.read_bytes(place, largest=100).decode()
  except InputError:
    return ""


def _flat(config: ConfigDict, prefix: str = "") -> dict[str, str]:
  """Return the settings by their dotted names."""
  found: dict[str, str] = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      found |= _flat(value, f"{prefix}{key}.")
    else:
      found[f"{prefix}{key}"] = json.dumps(value, default=str)
  return found


def _versions() -> dict[str, str]:
  return files.versions() | {"jaxlib": jax.lib.__version__}


def _source_files(steps: Iterable[Step]) -> dict[str, str]:
  """Return the hashes of the package's files, and of the user's own code."""
  root = pathlib.Path(__file__).parents[1]
  inside = {
    str(path.relative_to(root)): path for path in sorted(root.rglob("*.py"))
  }
  own = {
    name: names.file_of(name) for step in steps for name in own_names(step)
  }
  return {
    name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    for name, path in (inside | own).items()
  }


def _tokenizers(steps: Iterable[Step]) -> dict[str, str]:
  used = {step.config.get("tokenizer", "") for step in steps}
  return {
    name: str(load_tokenizer(addresses.tokenizer_folder(name)).fingerprint)
    for name in sorted(used)
    if name
  }


def _data(steps: Iterable[Step]) -> dict[str, str]:
  """Return of each source of files its rows, and a digest of a few."""
  specs = {
    json.dumps(spec.to_dict(), sort_keys=True, default=list): spec.to_dict()
    for step in steps
    for spec in step.config.get("sources", {}).values()
  }
  return {
    str(spec["path"]): _mark(opener.open_source(spec))
    for spec in specs.values()
    if spec.get("path")
  }


def _mark(source: rows.Source) -> str:
  texts = [
    _said(source, index)
    for index in sorted({0, len(source) // 2, len(source) - 1})
    if index >= 0
  ]
  return f"{len(source)} rows, {zlib.crc32(' '.join(texts).encode()):08x}"


def _said(source: rows.Source, index: int) -> str:
  """Return a row's texts; of one that cannot be read, why."""
  try:
    row: Mapping[str, object] = source.text(index)
  except InputError as error:
    return str(error)
  # Paths may differ between hosts, as may the times of files.
  return json.dumps({k: v for k, v in row.items() if k != "image"}, default=str)
