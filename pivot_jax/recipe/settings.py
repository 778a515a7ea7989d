"""The settings of a stage, recorded and present: which count, which differ."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def deciding(fields: Mapping[str, Any], free: Sequence[str]) -> dict[str, Any]:
  """Return the settings that count, as they are read back from JSON."""
  kept = {key: value for key, value in fields.items() if key not in free}
  return json.loads(json.dumps(kept, default=list))


def _without(node: Any, keys: Sequence[str]) -> Any:
  if not isinstance(node, Mapping):
    return node
  return {
    key: _without(value, keys) for key, value in node.items() if key not in keys
  }


def difference(
  before: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str]
) -> str:
  """Return the first few settings that differ, as `key: old -> new`."""
  was = _leaves(_without(before, free))
  new = _leaves(_without(json.loads(json.dumps(now, default=list)), free))
  changed = [
    f"{key}: {was.get(key)!r} -> {new.get(key)!r}"
    for key in sorted(was.keys() | new.keys())
    if was.get(key) != new.get(key)
  ]
  return "; ".join(changed[:4]) + (" ..." if len(changed) > 4 else "")


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(node, Mapping):
    return {prefix: node}
  found: dict[str, Any] = {}
  for key, value in node.items():
    found |= _leaves(value, f"{prefix}.{key}" if prefix else str(key))
  return found
