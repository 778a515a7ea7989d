"""The settings of a stage, recorded and present: which count, which differ."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

# Letters of a value that are shown.
_LONGEST = 40


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
    f"{key}: {_short(was.get(key))} -> {_short(new.get(key))}"
    for key in sorted(was.keys() | new.keys())
    if was.get(key) != new.get(key)
  ]
  return "; ".join(changed[:4]) + (" ..." if len(changed) > 4 else "")


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
  """Return each single setting by its key; a list of arms has their names."""
  found: dict[str, Any] = {}
  if isinstance(node, list) and all(isinstance(x, Mapping) for x in node):
    names = [x.get("name", place) for place, x in enumerate(node)]
    if len(set(map(str, names))) < len(names):
      names = list(range(len(names)))
    # Their order may be all that differs.
    found[prefix] = names
    node = dict(zip(names, node))
  if not isinstance(node, Mapping):
    return {prefix: node}
  for key, value in node.items():
    found |= _leaves(value, f"{prefix}.{key}" if prefix else str(key))
  return found


def _short(value: Any) -> str:
  """Return a value as a line shows it."""
  if isinstance(value, str) and len(value) > _LONGEST:
    value = value[:_LONGEST] + "..."
  text = repr(value)
  return text if len(text) <= 2 * _LONGEST else text[:_LONGEST] + " ..."
