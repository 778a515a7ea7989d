"""Looks at every row of data before it costs anything: text, images, lengths.

  python -m pivot_jax.data check train.jsonl eval.json --images=DIR
  python -m pivot_jax.data check configs/pivot.py:files --config.files.eval=...

Writes `bad.jsonl`, a line for each fault, and `check.json`, what there is in
each file, and says both in short. A source leaves out the rows that its `bad=`
names. The status is 1 if more rows are bad than --max-bad allows or a file
cannot be read at all, 2 if it cannot be told what to check.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import pathlib
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple, TextIO

import tqdm

from pivot_jax.data import (
  checking_config,
  checking_report,
  checking_rows,
  showing,
)
from pivot_jax.errors import InputError

BAD, SUMMARY = "bad.jsonl", "check.json"
MAX_LENGTH, PATCHES, TOKENIZER = 2048, 729, "package:toy"
# Fewer rows are looked at by this process: starting others takes seconds.
_FEW = 5_000
_CHUNK = 200


class Task(NamedTuple):
  """Rows of one of the targets."""

  number: int
  rows: range


def main(argv: Sequence[str]) -> int:
  """Checks what `argv` names; returns the exit status.

  Raises:
    InputError: no such file or config, or a folder that cannot be written.
  """
  given, overrides = _parser().parse_known_args(argv)
  wanted = _wanted(given, overrides)
  out = pathlib.Path(given.out)
  _check_apart(wanted.entries, out)
  settings = checking_rows.Settings(
    str(showing.tokenizer_folder(wanted.tokenizer)),
    wanted.patches,
    given.decode,
  )
  # Made here whoever uses it: a wrong tokenizer is answered at once.
  checker = checking_rows.Checker(settings)
  found = [checking_report.Summary(entry.path) for entry in wanted.entries]
  with _rewriting(out / BAD) as bad:
    targets = _open(wanted.entries, found, bad)
    tasks = _tasks(targets)
    rows = sum(len(task.rows) for task in tasks)
    workers = given.workers
    if workers < 0:
      workers = (os.cpu_count() or 1) if rows >= _FEW else 0
    if workers and tasks:
      parts = _parts_of_others(targets, settings, tasks, workers)
    else:
      parts = (checker.part(targets[task.number], task.rows) for task in tasks)
    _count(zip(tasks, parts), rows, found, bad)
  report = checking_report.summary(
    found,
    settings={
      "tokenizer": wanted.tokenizer,
      "patches": wanted.patches,
      "max_bad": given.max_bad,
      "decoded": given.decode,
      "max_length": {entry.path: entry.max_length for entry in wanted.entries},
    },
  )
  with _rewriting(out / SUMMARY) as file:
    file.write(json.dumps(report, indent=2) + "\n")
  allowed = report["bad_rows"] <= given.max_bad * report["rows"]
  _say(found, report, given.max_bad, out, wanted.tokenizer)
  return 0 if allowed and not report["unreadable_files"] else 1


def _tasks(targets: Sequence[checking_rows.Target | None]) -> list[Task]:
  return [
    Task(number, range(i, min(i + _CHUNK, len(target.source))))
    for number, target in enumerate(targets)
    if target
    for i in range(0, len(target.source), _CHUNK)
  ]


def _count(
  parts: Iterable[tuple[Task, checking_rows.Part]],
  rows: int,
  found: Sequence[checking_report.Summary],
  bad: TextIO,
) -> None:
  """Counts and writes what is found, in the order of the rows."""
  bar = tqdm.tqdm(
    total=rows,
    desc="checking",
    unit="row",
    disable=None if rows >= _FEW else True,
  )
  with bar:
    for task, part in parts:
      found[task.number].add(part)
      bad.writelines(map(checking_report.line, part.faults))
      bar.update(part.rows)


def _parts_of_others(
  targets, settings, tasks: Sequence[Task], workers: int
) -> Iterator[checking_rows.Part]:
  """Yields what other processes find of the rows of each task, in order."""
  pool = futures.ProcessPoolExecutor(
    min(workers, len(tasks)),
    # Not forked: this process has threads.
    multiprocessing.get_context("spawn"),
    _start,
    (targets, settings),
  )
  try:
    yield from pool.map(_part, tasks)
  except futures.process.BrokenProcessPool:
    raise InputError(
      "a process that looked at rows ended at once; if there was too little"
      " memory, give fewer --workers"
    ) from None
  finally:
    pool.shutdown(cancel_futures=True)


_given: list[Any] = []


def _start(targets, settings) -> None:
  _given[:] = checking_rows.Checker(settings), targets


def _part(task: Task) -> checking_rows.Part:
  checker, targets = _given
  return checker.part(targets[task.number], task.rows)


def _open(
  entries: Sequence[checking_config.Entry],
  found: Sequence[checking_report.Summary],
  bad: TextIO,
) -> list[checking_rows.Target | None]:
  """Opens what is to be checked; None stands for a file that has a fault."""
  targets = []
  for entry, summary in zip(entries, found):
    try:
      source = entry.open()
    except checking_rows.Unreadable as error:
      why = checking_rows.reason(error, entry.path)
      fault = checking_rows.Fault(entry.path, None, error.kind, why)
      summary.add_unreadable(fault)
      bad.write(checking_report.line(fault, row=False))
      targets.append(None)
      continue
    except OSError as error:
      raise InputError(f"{entry.path}: {error.strerror}") from None
    targets.append(
      checking_rows.Target(
        entry.path, source, entry.max_length, entry.max_pixels
      )
    )
  return targets


def _wanted(
  given: argparse.Namespace, overrides: Sequence[str]
) -> checking_config.Wanted:
  """Returns what the command line asks for, a config's own values filled in."""
  configs = [path for path in given.what if checking_config.is_config(path)]
  strange = [text for text in overrides if not text.startswith("--config.")]
  if strange or overrides and not configs:
    raise InputError(f"{(strange or overrides)[0]}: unknown; see --help")
  if given.images is not None and not pathlib.Path(given.images).is_dir():
    raise InputError(f"--images={given.images}: no such folder")
  defaults = checking_config.Wanted((), TOKENIZER, PATCHES)
  if configs:
    if len(given.what) > 1:
      raise InputError(f"{configs[0]}: give one config, or files")
    defaults = checking_config.read(
      configs[0], overrides, max_length=given.max_length, patches=PATCHES
    )
    entries = defaults.entries
  else:
    most = MAX_LENGTH if given.max_length is None else given.max_length
    entries = tuple(
      checking_config.Entry(path, given.images, most)
      for path in dict.fromkeys(given.what)
    )
  return checking_config.Wanted(
    entries,
    given.tokenizer or defaults.tokenizer or TOKENIZER,
    given.patches or defaults.patches,
  )


def _check_apart(
  entries: Sequence[checking_config.Entry], out: pathlib.Path
) -> None:
  """Raises if what is to be checked would be written over."""
  written = [(out / name).absolute() for name in (BAD, SUMMARY)]
  for entry in entries:
    if pathlib.Path(entry.path).absolute() in written:
      raise InputError(
        f"{entry.path}: is what this command writes; leave it out, or give"
        " another --out"
      )


@contextlib.contextmanager
def _rewriting(path: pathlib.Path) -> Iterator[TextIO]:
  """Gives a file to write, which takes the place of `path` when it is done."""
  aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = aside.open("w", encoding="utf-8")
  except OSError as error:
    raise InputError(f"--out={path.parent}: {error.strerror}") from None
  try:
    with file:
      yield file
    aside.replace(path)
  except BaseException:
    aside.unlink()
    raise


def _say(found, report, max_bad: float, out, tokenizer: str) -> None:
  """Writes what was found to the terminal, in short."""
  said = [text for file in found for text in file.lines()]
  unreadable = report["unreadable_files"]
  more = f", and {unreadable} files cannot be read" if unreadable else ""
  said += [
    f"{report['bad_rows']} of {report['rows']} rows are bad, allowed is a share"
    f" of {max_bad:g}{more}",
    f"{out / BAD} names them, {out / SUMMARY} counts; lengths are of tokenizer"
    f" {tokenizer}",
  ]
  text = "".join(f"{one}\n" for one in said)
  # What the terminal's encoding lacks is escaped.
  encoding = sys.stdout.encoding or "utf-8"
  sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


def _parser() -> argparse.ArgumentParser:
  kinds = "\n".join(
    textwrap.fill(
      f"{name:<18} {kind.meaning}",
      initial_indent="  ",
      subsequent_indent=" " * 21,
    )
    for name, kind in checking_report.KINDS.items()
  )
  parser = argparse.ArgumentParser(
    prog="python -m pivot_jax.data check",
    description="Looks at every row of data: text, images, lengths.",
    epilog=f"faults, of which a row has at most one:\n{kinds}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add(
    "what",
    nargs="+",
    metavar="CONFIG-or-FILE",
    help="data files or folders, or a config, whose values --config.x=y sets",
  )
  add("--images", metavar="DIR", help="the folder that image paths are in")
  add(
    "--tokenizer",
    metavar="ADDRESS",
    help="folder or address of the language model's tokenizer (the config's, or"
    f" {TOKENIZER})",
  )
  add(
    "--max-length",
    type=_whole(0),
    metavar="N",
    help=f"tokens that a row may have, 0: any number (the config's, or"
    f" {MAX_LENGTH})",
  )
  add(
    "--patches",
    type=_whole(1),
    metavar="N",
    help=f"tokens of an image (the config's, or {PATCHES})",
  )
  add(
    "--max-bad",
    type=_share,
    default=0.0,
    metavar="SHARE",
    help="of rows that may be bad (0)",
  )
  add(
    "--workers",
    type=_whole(-1),
    default=-1,
    metavar="N",
    help=f"processes; 0: this one, -1: one a core for {_FEW} rows or more",
  )
  add("--out", default=".", metavar="DIR", help="folder of what is written (.)")
  add(
    "--no-decode",
    dest="decode",
    action="store_false",
    help="do not decode images, only read their files",
  )
  return parser


def _whole(least: int):
  def read(text: str) -> int:
    number = int(text)
    if number < least:
      raise argparse.ArgumentTypeError(f"{text}: give {least} or more")
    return number

  read.__name__ = "whole number"  # In argparse's message of another text.
  return read


def _share(text: str) -> float:
  number = float(text)
  if not 0 <= number <= 1:
    raise argparse.ArgumentTypeError(f"{text}: give a share, 0 to 1")
  return number
