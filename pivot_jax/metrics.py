"""Metrics on their way out: jsonl, other writers, one status line. Process 0.

What a metric means is decided where it is computed; here they are plain floats
by name. A measured number of a stage is `measured(...)`: value, n and standard
error together, so that no table ever shows one without the others.
"""

import contextlib
import importlib.util
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from pivot_jax import files, goodput, names, processes, texts
from pivot_jax.errors import InputError

Measured = dict[str, Any]
_DAMAGED = "the file is damaged; use a copy, or delete the folder to make the stage again"
# What is read of done.json and begun.json.
_FIELDS = {
  **dict.fromkeys(("fields", "inputs", "outputs", "metrics", "versions"), dict),
  **dict.fromkeys(("kind", "config"), str),
}
# Bytes of a file of metrics; those of a million updates have a third of it.
_LARGEST = 2**30


def measured(value: float, n: int, se: float | None) -> Measured:
  """Return one measured number: value, sample size, standard error.

  Of a single item no error is known, which is None.
  """
  known = se is not None and math.isfinite(se)
  return {"value": float(value), "n": int(n), "se": se if known else None}


def share(hits: float, n: int) -> Measured:
  """Return hits/n with its binomial standard error."""
  if n == 0:
    raise InputError("a share of nothing: the evaluation set is empty")
  rate = hits / n
  return measured(rate, n, math.sqrt(rate * (1 - rate) / n))


def number(value: str | float | Sequence | Mapping | None, where: str) -> float:
  """Return a number that was read; raise InputError if it is none."""
  if isinstance(value, int | float) and not isinstance(value, bool):
    with contextlib.suppress(OverflowError):
      return float(value)
  said = texts.shown(repr(value), longest=60)
  raise InputError(f"{where} is {said}, not a number: {_DAMAGED}")


def read_record(path: pathlib.Path, *needs: str) -> dict[str, Any]:
  """Return the record of a stage, done.json or begun.json.

  Raises:
    InputError: a field of `needs` is absent or of another type, or a measured
      number is none.
  """
  try:
    done = files.read_object(path)
  except InputError as error:
    raise InputError(f"{error}: {_DAMAGED}") from error
  for name in needs:
    if name == "seconds":
      number(done.get(name), f"{path}: {name}")
    elif not isinstance(done.get(name), _FIELDS[name]):
      kind = _FIELDS[name].__name__
      raise InputError(f"{path}: {name} is no {kind}: {_DAMAGED}")
  if "versions" in needs:
    done["versions"] = {k: str(v) for k, v in done["versions"].items()}
  if "metrics" in needs:
    for name, value in done["metrics"].items():
      _check_measured(value, f"{path}: metrics.{name}")
  return done


def _check_measured(value: Any, where: str) -> None:
  if isinstance(value, Mapping) and "value" in value:
    number(value["value"], f"{where}.value")
    for name in ("n", "se"):
      if value.get(name) is not None:
        number(value[name], f"{where}.{name}")


def numbers(returned: Mapping[str, Any] | None, who: str) -> dict[str, Any]:
  """Return what a stage returned as JSON has it, arrays without an axis too.

  Raises InputError, which begins with `who`, for anything else.
  """
  if not isinstance(returned, Mapping):
    raise InputError(
      f"{who}: returned {type(returned).__name__}, not a mapping of its numbers"
    )
  return _plain(returned, "", who)


def _plain(value: Any, place: str, who: str) -> Any:
  if isinstance(value, Mapping):
    for key in value:
      if not isinstance(key, str):
        where = f" in {place!r}" if place else ""
        raise InputError(f"{who}: the key {key!r}{where} is no text; use str()")
    return {
      key: _plain(inner, f"{place}/{key}".lstrip("/"), who)
      for key, inner in value.items()
    }
  if isinstance(value, (list, tuple)):
    return [_plain(inner, place, who) for inner in value]
  arrays = (np.generic, np.ndarray, jax.Array)
  if isinstance(value, arrays) and value.ndim == 0:
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    raise InputError(
      f"{who}: {place!r} is {value}; return a finite number, or None where none "
      "is known"
    )
  if value is None or isinstance(value, (str, int, float)):
    return value
  shape = f" of shape {value.shape}" if isinstance(value, arrays) else ""
  raise InputError(
    f"{who}: {place!r} is a {type(value).__name__}{shape}; return numbers, "
    "texts or lists of them, and write the rest to a file in the folder `out`"
  )


@runtime_checkable
class MetricWriter(Protocol):
  """Takes metrics: what an entry of `WRITERS` or of your own makes."""

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Take the metrics of a step."""
    ...

  def close(self) -> None:
    """Write out what is still held."""
    ...


class Writer:
  """Appends metrics of a run to `metrics.jsonl`, and to other writers.

  Lines after `step` are dropped when a run resumes there, so that a killed and
  a straight run leave the same file.
  """

  def __init__(
    self, folder: pathlib.Path, *, step: int, writers: Sequence[str] = ()
  ):
    """Open the writers.

    Args:
      folder: of the stage.
      step: the last update that is kept.
      writers: names of `WRITERS`, or of your own (`pivot_jax.names`): functions
        of folder and step that return a `MetricWriter`. Yours have a folder
        `writers/`, which stays when a run resumes.
    """
    self._path = folder / "metrics.jsonl"
    self._others = []
    if not processes.first():
      return
    for path in (self._path, self._path.with_name("speed.jsonl")):
      lines = _lines(path)
      kept = [line for line in lines if line["step"] <= step]
      if path == self._path:
        goodput.repeated(len(lines) - len(kept))
      if kept or path == self._path:
        text = "".join(json.dumps(line) + "\n" for line in kept)
        files.write_text(path, text)
      elif path.exists():
        path.unlink()
    for name in writers:
      place = folder / "writers" if names.is_own(name) else folder
      files.make_folder(place)
      self._others.append(_open(name, place, step))

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Append one line `{"step": step, name: value, ...}`."""
    self._write(self._path, step, metrics)

  def write_speed(self, step: int, metrics: Mapping[str, float]) -> None:
    """Append a line to `speed.jsonl`: what no two runs have in common."""
    self._write(self._path.with_name("speed.jsonl"), step, metrics)

  def write_samples(
    self, samples: Sequence[tuple[str, Sequence[np.ndarray], str]]
  ) -> None:
    """Show (id, images uint8 [H, W, 3], text) of rows in TensorBoard."""
    for board in self._boards():
      board.write_samples(samples)

  @property
  def shows_samples(self) -> bool:
    """True if TensorBoard, which shows rows, is a writer."""
    return bool(self._boards())

  def _boards(self) -> list["Board"]:
    return [other for other in self._others if isinstance(other, Board)]

  def close(self) -> None:
    """Write out what writers still hold."""
    for other in self._others:
      other.close()

  def _write(self, path, step, metrics) -> None:
    if not processes.first():
      return
    line = {"step": step} | {k: float(f"{v:.6g}") for k, v in metrics.items()}
    files.append_text(path, json.dumps(line) + "\n")
    for other in self._others:
      other.write(step, metrics)


def read(folder: pathlib.Path) -> list[dict[str, float]]:
  """Return the lines of a run's metrics.jsonl, oldest first."""
  return _lines(folder / "metrics.jsonl")


class Status:
  """One status line with the time left; a bar on a terminal."""

  # Seconds between lines where the output is a file.
  EVERY = 20.0

  def __init__(self, name: str, total: int, *, start: int = 0):
    self._name, self._total, self._start = name, total, start
    self._began = self._shown = time.monotonic()
    self._live = sys.stderr.isatty()

  def due(self, step: int) -> bool:
    """Return whether `show` would show this step."""
    quiet = 0.1 if self._live else self.EVERY
    waited = time.monotonic() - self._shown >= quiet
    return processes.first() and (waited or step >= self._total)

  def show(self, step: int, text: str = "") -> None:
    """Show progress; on a file at most every `EVERY` seconds and at the end."""
    if not self.due(step):
      return
    now = self._shown = time.monotonic()
    done = step >= self._total
    rate = (now - self._began) / max(1, step - self._start)
    left = rate * (self._total - step)
    line = f"{self._name} {step}/{self._total} {text} {_clock(left)} left"
    line = texts.shown(line)
    if self._live:
      filled = int(24 * step / max(1, self._total))
      bar = "█" * filled + "·" * (24 - filled)
      end = "\n" if done else ""
      sys.stderr.write(f"\r\x1b[2K{bar} {line}{end}")
    else:
      sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _clock(seconds: float) -> str:
  return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _lines(path: pathlib.Path) -> list[dict[str, float]]:
  if not path.exists():
    return []
  data = files.read_bytes(path, largest=_LARGEST)
  found = data.decode("utf-8", "backslashreplace").splitlines()
  # A killed process may leave half of its last line.
  if found and not found[-1].endswith("}"):
    found.pop()
  lines = []
  for place, text in enumerate(found, 1):
    where = f"{path}, line {place}"
    line = files.parse_line(text, where)
    for name, value in line.items():
      number(value, f"{where}: {name}")
    number(line.get("step"), f"{where}: step")
    lines.append(line)
  return lines


class Board:
  """Writes metrics and rows as TensorBoard reads them."""

  def __init__(self, folder: pathlib.Path, step: int):
    check_writers(("tensorboard",))
    import tensorboardX

    place = folder / "tensorboard"
    files.make_folder(place)
    # What was written after the step where a run goes on is not shown.
    self._board = tensorboardX.SummaryWriter(
      str(place), purge_step=step + 1 if step else None
    )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Write the metrics of a step."""
    for name, value in metrics.items():
      self._board.add_scalar(name, value, step)

  def write_samples(
    self, samples: Sequence[tuple[str, Sequence[np.ndarray], str]]
  ) -> None:
    """Show (id, images uint8 [H, W, 3], text) of rows."""
    for number, (name, images, text) in enumerate(samples):
      for place, image in enumerate(images):
        tag = f"samples/{number}/image{place}"
        self._board.add_image(tag, image, 0, dataformats="HWC")
      # Code and indented text are shown as they are: no tag in them acts.
      lines = "\n".join(f"    {line}" for line in text.splitlines())
      said = f"{texts.markdown(name)}\n\n{lines}"
      self._board.add_text(f"samples/{number}/text", said, 0)

  def close(self) -> None:
    """Write out what TensorBoard has not got yet."""
    self._board.close()


WRITERS = {"tensorboard": Board}


def named_writer(name: str) -> Callable[[pathlib.Path, int], MetricWriter]:
  """Return what opens a writer; raise InputError if nothing of the name does."""
  found = names.named(name, WRITERS, "writers")
  names.check_call(f"writers={name!r}", found, ("folder", "step"))
  return found


def _open(name: str, folder: pathlib.Path, step: int) -> MetricWriter:
  """Return a writer, which is one."""
  found, who = named_writer(name)(folder, step), f"writers={name!r}"
  if not isinstance(found, MetricWriter):
    raise InputError(
      f"{who}: made a {type(found).__name__}, which has no write(step, metrics) "
      "and close()"
    )
  names.check_call(f"{who}: its write", found.write, ("step", "metrics"))
  names.check_call(f"{who}: its close", found.close, ())
  return found


def check_writers(writers: Sequence[str]) -> None:
  """Raise InputError for a writer that is not known or not installed."""
  for name in writers:
    named_writer(name)
  board = importlib.util.find_spec("tensorboardX")
  if "tensorboard" in writers and board is None:
    raise InputError(
      "TensorBoard needs tensorboardX: pip install pivot_jax[tensorboard]"
    )
