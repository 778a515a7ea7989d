"""Looks at every row of data before it costs anything: text, images, lengths.

  python -m pivot_jax.data check train.jsonl eval.json --images=DIR
  python -m pivot_jax.data check configs/pivot.py:files --config.files.eval=...

Writes `bad.jsonl`, a line for each fault, and `check.json`, the counts of each
file, and says both in short. A source skips the rows that its `bad=` names, but
for those that are only noted. The status is 1 if more rows are bad than
--max-bad allows or a file cannot be read at all, 2 if the arguments name
nothing to check.
"""

import argparse
import contextlib
import json
import os
import pathlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import tqdm

from pivot_jax import addresses, files, output, recipes
from pivot_jax.data import chat, coders, pool
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.data.tools import check_files, check_rows, faults
from pivot_jax.errors import InputError

BAD, SUMMARY = "bad.jsonl", "check.json"
MAX_LENGTH = 2048
# Fewer rows are looked at by this process: starting others takes seconds.
_FEW = 5_000


def main(argv: Sequence[str]) -> int:
  """Check the files that `argv` names; return the exit status.

  Raises:
    InputError: no such file or config, or a folder that cannot be written.
  """
  args, overrides = _parser().parse_known_args(argv)
  wanted = _wanted(args, overrides)
  out = files.local_path(args.out, "--out")
  _check_apart(wanted.entries, out)
  found = [
    faults.Summary(one.path, max_bad=one.max_bad, long=one.long)
    for one in wanted.entries
  ]
  with _writing(out / BAD) as bad:
    targets = _open(wanted.entries, found, bad)
    _look(targets, args, found, bad)
  report = faults.summary(
    found,
    settings={
      "tokenizer": wanted.tokenizer or check_rows.TOKENIZER,
      "too_long_is_judged": bool(wanted.tokenizer),
      "patches": wanted.patches or check_rows.PATCHES,
      "patches_are_known": wanted.patches is not None,
      "decoded": args.decode,
      "max_length": {entry.path: entry.max_length for entry in wanted.entries},
    },
    skipped=wanted.skipped,
  )
  files.write_text(out / SUMMARY, json.dumps(report, indent=2) + "\n")
  _say(found, report, out)
  return 0 if all(file.is_allowed for file in found) else 1


def _look(
  targets: check_rows.Targets,
  args: argparse.Namespace,
  found: Sequence[faults.Summary],
  bad: TextIO,
) -> None:
  """Look at all rows, in this process or several others."""
  held = check_rows.Checker(decode=args.decode), targets
  tasks = check_rows.tasks(targets)
  rows = sum(len(task.rows) for task in tasks)
  workers = args.workers
  if workers < 0:
    workers = (os.cpu_count() or 1) if rows >= _FEW else 0
  if workers and tasks:
    parts = pool.results(
      check_rows.look,
      held,
      tasks,
      processes=workers,
      broken="a process that looked at rows ended at once; if there was too"
      " little memory, give fewer --workers",
    )
  else:
    parts = (check_rows.look(held, task) for task in tasks)
  _count(zip(tasks, parts), rows, found, bad)


def _count(
  parts: Iterable[tuple[check_rows.Task, check_rows.Part]],
  rows: int,
  found: Sequence[faults.Summary],
  bad: TextIO,
) -> None:
  """Count and write the faults, in the order of the rows."""
  bar = tqdm.tqdm(
    total=rows,
    desc="checking",
    unit="row",
    disable=None if rows >= _FEW else True,
  )
  with bar:
    for task, part in parts:
      found[task.number].add(part)
      bad.writelines(map(faults.line, part.faults))
      bar.update(part.rows)


def _open(
  entries: Sequence[check_rows.Entry],
  found: Sequence[faults.Summary],
  bad: TextIO,
) -> list[check_rows.Target | None]:
  """Open the entries; None stands for a file that has a fault."""
  targets: list[check_rows.Target | None] = []
  for entry, summary in zip(entries, found):
    try:
      source = entry.open()
    except (InputError, OSError) as error:
      fault = _of_file(entry.path, error)
      summary.add_unreadable(fault)
      bad.write(faults.line(fault, row=False))
      targets.append(None)
      continue
    targets.append(
      check_rows.Target(
        entry.path, source, entry.codings, entry.frames, entry.max_pixels
      )
    )
  return targets


def _of_file(path: str, error: InputError | OSError) -> check_rows.Fault:
  """Return the fault of a file; raise if there is none of that name."""
  if not isinstance(error, InputError):
    error = InputError(f"{path}: {error.strerror}")
  if not check_files.is_there(path):
    raise error
  why = check_rows.reason(error, path)
  return check_rows.Fault(path, None, error.kind or "unreadable", why)


def _wanted(
  args: argparse.Namespace, overrides: Sequence[str]
) -> check_rows.Wanted:
  """Return the entries of the command line, a config's own values filled in."""
  configs = [path for path in args.what if recipes.is_recipe(path)]
  strange = [text for text in overrides if not text.startswith("--config.")]
  if strange or overrides and not configs:
    raise InputError(f"{(strange or overrides)[0]}: unknown; see --help")
  if args.images is not None and not pathlib.Path(args.images).is_dir():
    raise InputError(f"--images={args.images}: no such folder")
  wanted = _of_config(configs[0], args, overrides) if configs else _of(args)
  if not wanted.tokenizer:
    # Another tokenizer's tokens say nothing of a limit.
    unlimited = tuple(entry.limited(0) for entry in wanted.entries)
    wanted = wanted._replace(entries=unlimited)
  return wanted


def _of_config(
  config: str, args: argparse.Namespace, overrides: Sequence[str]
) -> check_rows.Wanted:
  # A recipe needs jax, which takes seconds to load; files need neither.
  from pivot_jax.data.tools import check_config

  if len(args.what) > 1:
    raise InputError(f"{config}: give one config, or files")
  if args.template:
    raise InputError(
      f"--template={args.template}: is for files; the stages of"
      f" {config} have theirs"
    )
  return check_config.read(
    config,
    overrides,
    check_config.Overrides(
      args.tokenizer, args.patches, args.max_length, args.max_bad
    ),
  )


def _of(args: argparse.Namespace) -> check_rows.Wanted:
  """Return the files of the command line, and how they are read."""
  if args.max_length and not args.tokenizer:
    raise InputError(
      f"--max-length={args.max_length}: give --tokenizer, whose tokens these"
      " are"
    )
  most = MAX_LENGTH if args.max_length is None else args.max_length
  section = check_rows.ALONE | {"max_length": most}
  if args.template:
    section["template"] = args.template
  address = args.tokenizer or check_rows.TOKENIZER
  coder = coders.coder_of(
    section,
    load_tokenizer(addresses.tokenizer_folder(address)),
    patches=args.patches or check_rows.PATCHES,
  )
  entries = [
    check_rows.Entry(path, args.images, (coder,), max_bad=args.max_bad or 0.0)
    for path in dict.fromkeys(args.what)
  ]
  return check_rows.Wanted(
    tuple(entries), args.tokenizer or "", args.patches, {}
  )


def _check_apart(
  entries: Sequence[check_rows.Entry], out: pathlib.Path
) -> None:
  """Raise if what is to be checked would be written over."""
  written = [(out / name).absolute() for name in (BAD, SUMMARY)]
  for entry in entries:
    if pathlib.Path(entry.path).absolute() in written:
      raise InputError(
        f"{entry.path}: is what this command writes; skip it, or give"
        " another --out"
      )


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[TextIO]:
  """Give a file to write, which takes the place of `path` when it is done."""
  with contextlib.ExitStack() as stack:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      aside = stack.enter_context(files.writing(path))
      file = stack.enter_context(aside.open("w", encoding="utf-8"))
    except OSError as error:
      raise InputError(f"--out={path.parent}: {error.strerror}") from None
    yield file


def _say(
  found: Sequence[faults.Summary], report: Mapping[str, Any], out: pathlib.Path
) -> None:
  """Write the findings to the terminal, in short."""
  said = [text for file in found for text in file.lines()]
  said += [
    f"{name}: not looked at ({why})"
    for name, why in report["not_looked_at"].items()
  ]
  unreadable = report["unreadable_files"]
  more = f", and {unreadable} files cannot be read" if unreadable else ""
  over = [
    f"{file.path} ({file.bad_rows} of {file.rows}, allowed is a share of"
    f" {file.max_bad:g})"
    for file in found
    if not (file.unreadable or file.is_allowed)
  ]
  said += [
    f"{report['bad_rows']} of {report['rows']} rows are bad{more}",
    *(f"too many: {one}" for one in over),
    *(_measure(report["settings"]) if _has_lengths(report) else ()),
    f"{out / BAD} names rows, {out / SUMMARY} counts",
  ]
  output.show(said)


def _has_lengths(report: Mapping[str, Any]) -> bool:
  return any(file["tokens"] for file in report["files"])


def _measure(settings: Mapping[str, Any]) -> list[str]:
  """Return the measures of lengths in words."""
  patches = f"{settings['patches']} for an image"
  if not settings["patches_are_known"]:
    patches += ", which is a guess: give --patches"
  said = [f"tokens are those of {settings['tokenizer']}, {patches}"]
  if not settings["too_long_is_judged"]:
    said.append(
      "no row is judged too_long: give --tokenizer, the language model's, as"
      " another may take several times as many tokens"
    )
  return said


def _kinds() -> str:
  """Return the kinds of fault as a list for the help text."""
  return "\n".join(
    textwrap.fill(
      f"{name:<18} {kind.meaning}",
      initial_indent="  ",
      subsequent_indent=" " * 21,
    )
    for name, kind in faults.KINDS.items()
  )


def _parser() -> argparse.ArgumentParser:
  parser = _described()
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
    help="folder or address of the language model's tokenizer (the config's;"
    f" for files {check_rows.TOKENIZER} measures, and no row is too_long)",
  )
  add(
    "--template",
    choices=chat.TEMPLATES,
    help=f"of files; a config's stages have theirs ({check_rows.ALONE['template']})",
  )
  add(
    "--max-length",
    type=_whole(0),
    metavar="N",
    help="tokens that a row may have, 0: any number (that of the config's"
    f" stages, or {MAX_LENGTH})",
  )
  add(
    "--patches",
    type=_whole(1),
    metavar="N",
    help=f"tokens of an image (those of the config's encoder, or"
    f" {check_rows.PATCHES})",
  )
  add(
    "--max-bad",
    type=_share,
    metavar="SHARE",
    help="of a file's rows that may be bad (that of the config's source, or 0)",
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


def _described() -> argparse.ArgumentParser:
  """Return the parser without its arguments."""
  return argparse.ArgumentParser(
    prog="python -m pivot_jax.data check",
    description="Looks at every row of data: text, images, lengths.",
    epilog=f"faults, of which a row has at most one:\n{_kinds()}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


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
