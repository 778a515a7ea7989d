"""Nested dicts of arrays seen as flat paths: select, split, merge, compare.

Every rule of the project (what trains, at which rate, where it is placed, which
subtree a checkpoint gives) is a pattern over paths such as
`llm/layers/self_attn/q_proj/kernel`. This file is about paths and leaves alone:
it knows no model, optimizer, mesh or file.
"""

import dataclasses
import difflib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from pivot_jax import texts
from pivot_jax.errors import InputError

Tree = Any
# Numbers that are compared at a time.
_BLOCK = 2**22
# Of a model: arrays in nested dicts, or `Deferred` leaves before they are read.
Params = Mapping[str, Any]


@dataclasses.dataclass(eq=False)
class Deferred:
  """A leaf whose values are read each time they are asked for.

  To numpy it is an array, so that a tree can be placed on devices leaf by leaf
  while host memory holds one of them.

  shape, dtype: of the leaf.
  read: reads it whole, into an array that is nobody else's, and checks it.
  place: reads onto devices what each holds, in a dtype, and checks nothing;
    None where it can only be read whole.
  verified: whether it was read whole once, by any of the processes.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]
  place: Callable[[jax.sharding.Sharding, np.dtype], Array] | None = None
  verified: bool = False

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    # Read anew, the array is nobody else's: numpy need not copy it.
    array = self.read()
    return array if dtype is None else array.astype(dtype)


def flatten(tree: Tree) -> dict[str, Any]:
  """Return `{"a/b/c": leaf}` of a nested dict, in sorted order of paths."""
  return dict(_leaves("", tree)) if tree else {}


def _leaves(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
  # A function of the module: one that is nested and calls itself is a cycle,
  # which would hold every leaf until the next collection.
  if not isinstance(node, Mapping):
    yield prefix, node
    return
  for key in sorted(node):
    yield from _leaves(f"{prefix}/{key}" if prefix else key, node[key])


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Return the nested dict of `flatten`'s result."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def subtree(tree: Tree, path: str) -> Tree:
  """Return the part of the tree below `path` (the whole for an empty path)."""
  node = tree
  for key in filter(None, path.split("/")):
    if not isinstance(node, Mapping) or key not in node:
      found = ", ".join(sorted(node)) if isinstance(node, Mapping) else "a leaf"
      raise InputError(f"no subtree {path!r}: at {key!r} there is {found}")
    node = node[key]
  return node


def first_match(rules: Sequence[tuple[str, Any]], path: str) -> Any:
  """Return the value of the first rule whose pattern matches all of `path`."""
  for pattern, value in rules:
    if re.fullmatch(pattern, path):
      return value
  raise InputError(
    f"no rule covers the parameter {path!r}; rules: "
    f"{[pattern for pattern, _ in rules]}; add one, for example ('.*', ...)"
  )


def match(rules: Sequence[tuple[str, Any]], tree: Tree) -> dict[str, Any]:
  """Return `{path: value}`; a path without a match, or a dead rule, raises."""
  paths = list(flatten(tree))
  values = {path: first_match(rules, path) for path in paths}
  for pattern, _ in rules:
    if not any(re.fullmatch(pattern, path) for path in paths):
      raise InputError(
        f"the rule {pattern!r} matches no parameter; did you mean "
        f"{_closest(pattern, paths)}?"
      )
  return values


def split(tree: Tree, patterns: Sequence[str]) -> tuple[Tree, Tree]:
  """Return (leaves that match any of the patterns, all other leaves)."""
  flat = flatten(tree)
  for pattern in patterns:
    if not any(re.fullmatch(pattern, path) for path in flat):
      raise InputError(
        f"trainable pattern {pattern!r} matches no parameter; did you mean "
        f"{_closest(pattern, list(flat))}?"
      )
  chosen = {
    path for path in flat if any(re.fullmatch(p, path) for p in patterns)
  }
  inside = {path: leaf for path, leaf in flat.items() if path in chosen}
  outside = {path: leaf for path, leaf in flat.items() if path not in chosen}
  return unflatten(inside), unflatten(outside)


def merge(*trees: Tree) -> Tree:
  """Return the union of trees that share no leaf."""
  union: dict[str, Any] = {}
  for tree in trees:
    flat = flatten(tree)
    both = sorted(union.keys() & flat.keys())
    if both:
      raise ValueError(f"trees overlap at {both[:3]}")
    union.update(flat)
  return unflatten(union)


def diff(expected: Tree, actual: Tree) -> list[str]:
  """Return one line per missing, extra or misshapen leaf of `actual`."""
  want, have = flatten(expected), flatten(actual)
  lines = [f"missing {p} {tuple(want[p].shape)}" for p in want if p not in have]
  lines += [f"extra {p} {tuple(have[p].shape)}" for p in have if p not in want]
  lines += [
    f"shape of {p} is {tuple(have[p].shape)}, not {tuple(want[p].shape)}"
    for p in want
    if p in have and tuple(want[p].shape) != tuple(have[p].shape)
  ]
  return lines


def fingerprint(tree: Tree) -> dict[str, str]:
  """Return `{path: CRC32 of dtype, shape and bytes, 8 hex digits}`."""
  return {path: leaf_crc(leaf) for path, leaf in flatten(tree).items()}


def leaf_crc(leaf: Array | np.ndarray | np.generic | Deferred) -> str:
  """Return the CRC32 of one array's dtype, shape and bytes in hexadecimal."""
  array = np.ascontiguousarray(jax.device_get(leaf))
  head = f"{array.dtype}{tuple(leaf.shape)}".encode()
  return (
    f"{zlib.crc32(array.view(np.uint8).reshape(-1).data, zlib.crc32(head)):08x}"
  )


def table(
  prints: Mapping[str, str],
  tree: Tree,
  sources: Mapping[str, str],
  trainable: Sequence[str],
) -> str:
  """Return what a model starts from, one line a part of the tree.

  The columns: part, source, parameters, dtype, fingerprint (one CRC32 over
  those of the leaves, `prints`), and how many of the parameters train.
  """
  rows = [("part", "source", "parameters", "dtype", "fingerprint", "trainable")]
  flat = flatten(tree)
  for part in tree:
    paths = [path for path in flat if path.split("/")[0] == part]
    dtypes = sorted({str(np.dtype(flat[path].dtype)) for path in paths})
    sizes = {path: int(np.prod(flat[path].shape)) for path in paths}
    trains = sum(
      size
      for path, size in sizes.items()
      if any(re.fullmatch(pattern, path) for pattern in trainable)
    )
    rows.append(
      (
        part,
        sources.get(part, "random"),
        f"{sum(sizes.values()):,}",
        ",".join(dtypes),
        digest({path: prints[path] for path in paths}),
        f"{trains:,}",
      )
    )
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return "\n".join(
    texts.shown("  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip())
    for row in rows
  )


def digest(values: Mapping[str, str] | Iterable[str]) -> str:
  """Return one CRC32 over strings, or over sorted `key=value` pairs."""
  if isinstance(values, Mapping):
    values = [f"{key}={values[key]}" for key in sorted(values)]
  return f"{zlib.crc32(chr(10).join(values).encode()):08x}"


def count(tree: Tree) -> int:
  """Return the number of scalars in a tree of arrays or shapes."""
  return sum(int(np.prod(leaf.shape)) for leaf in flatten(tree).values())


def relative_change(before: Tree, after: Tree) -> float:
  """Return |after - before| / |before|, Euclidean over all leaves."""
  old, new = flatten(before), flatten(after)
  if old.keys() != new.keys():
    raise ValueError(f"trees differ: {sorted(old.keys() ^ new.keys())[:3]}")
  return _ratio([_squares(old[path], new[path]) for path in old])


class Change:
  """Compares a tree with what becomes of it, one leaf at a time.

  `moved` are the parts (first names of paths) with a leaf that is not as it was.
  """

  def __init__(self, before: Tree):
    self.moved: set[str] = set()
    self._before = flatten(before)
    self._squares: dict[str, tuple[float, float]] = {}

  def add(self, path: str, after: np.ndarray) -> None:
    """Take a leaf as it is now; the one before is read where it is deferred."""
    old = np.asarray(self._before[path])
    self._squares[path] = _squares(old, after)
    if not np.array_equal(old, after):
      self.moved.add(path.partition("/")[0])

  def of(self, part: str) -> float:
    """Return what `relative_change` does of a part whose leaves were added."""
    inside = [x for x in self._before if x.partition("/")[0] == part]
    return _ratio([self._squares[path] for path in inside])


def _ratio(squares: Sequence[tuple[float, float]]) -> float:
  change = sum([one for one, _ in squares])
  return float(np.sqrt(change / sum([size for _, size in squares])))


def _squares(old: Any, new: Any) -> tuple[float, float]:
  """Return the sums of the squares of new - old, and of old."""
  old, new = (np.asarray(leaf).reshape(-1) for leaf in (old, new))

  def change(start: int, stop: int) -> np.ndarray:
    return np.float64(new[start:stop]) - np.float64(old[start:stop])

  def size(start: int, stop: int) -> np.ndarray:
    return np.float64(old[start:stop])

  return _sum_squares(change, 0, len(old)), _sum_squares(size, 0, len(old))


def _sum_squares(
  values: Callable[[int, int], np.ndarray], start: int, stop: int
) -> float:
  """Return what np.sum gives of all squares, to the last bit, block by block.

  numpy halves what it adds in the same way, down to less than a block.
  """
  count = stop - start
  if count <= _BLOCK:
    return float(np.sum(values(start, stop) ** 2))
  half = start + count // 2 - count // 2 % 8
  return _sum_squares(values, start, half) + _sum_squares(values, half, stop)


def _closest(pattern: str, paths: list[str]) -> str:
  near = difflib.get_close_matches(pattern, paths, n=2, cutoff=0.0)
  return " or ".join(repr(path) for path in near)
