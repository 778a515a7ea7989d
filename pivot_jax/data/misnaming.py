"""Makes captions that are wrong in exactly one detail.

A wrong caption is the true caption of a scene that differs in one thing, never
an edit of the text, so it reads as any other: in the canonical order and with
the right number of objects named. Each change is a move that leads back with
the same chance, which leaves the uniform distribution of scenes as it is: wrong
captions are distributed as right ones.
"""

import dataclasses

import numpy as np

from pivot_jax.data import layout, questions


def describe(
  description: layout.Description, rng: np.random.Generator
) -> questions.Question:
  """Asks for the caption; the rejected one is wrong in one detail."""
  wrong, owners = misname(description, rng)
  return questions.Question(
    kind="describe",
    category="general",
    question=questions.DESCRIBE,
    answer=questions.caption(description),
    rejected=questions.caption(wrong),
    owners=owners,
  )


def misname(
  description: layout.Description, rng: np.random.Generator
) -> tuple[layout.Description, tuple[int, ...]]:
  """Returns a scene that differs in one detail, and the things it is about.

  A detail that this scene lacks falls back on one that every scene has: the
  chance of adding an object must not depend on what else is there.
  """
  details = tuple(_CHANGES)
  changed = _CHANGES[details[rng.integers(len(details))]](description, rng)
  if changed is None:
    changed = _CHANGES[_ALWAYS[rng.integers(len(_ALWAYS))]](description, rng)
  return changed


def _exchange(description, rng, field, options):
  """Gives an object another value; whoever had that value takes the old."""
  objects = list(description.objects)
  i = int(rng.integers(len(objects)))
  old = _fields(objects[i])[field]
  new = questions.other(rng, options, old)
  owners = [i + 1]
  for j, one in enumerate(objects):
    if _fields(one)[field] == new:
      objects[j] = dataclasses.replace(one, **{field: old})
      owners.append(j + 1)
  objects[i] = dataclasses.replace(objects[i], **{field: new})
  return _with_objects(description, objects), tuple(owners)


def _change_colour(description, rng):
  return _exchange(description, rng, "colour", layout.COLOURS)


def _change_shape(description, rng):
  return _exchange(description, rng, "shape", layout.SHAPES)


def _change_texture(description, rng):
  objects = list(description.objects)
  i = int(rng.integers(len(objects)))
  texture = questions.other(rng, layout.TEXTURES, objects[i].texture)
  objects[i] = dataclasses.replace(objects[i], texture=texture)
  return _with_objects(description, objects), (i + 1,)


def _change_size(description, rng):
  """Makes another object the large one."""
  objects = list(description.objects)
  if len(objects) == 1:
    return None
  (i,) = (i for i, one in enumerate(objects) if one.size == "large")
  j = questions.other(rng, range(len(objects)), i)
  objects[i] = dataclasses.replace(objects[i], size="small")
  objects[j] = dataclasses.replace(objects[j], size="large")
  return _with_objects(description, objects), (i + 1, j + 1)


def _change_place(description, rng):
  """Moves an object, a sign or the chart to a free cell."""
  plates = {
    "digit": (description.digit, layout.DIGIT),
    "letter": (description.letter, layout.LETTER),
    "chart": (description.chart, layout.CHART),
  }
  there = [name for name, (plate, _) in plates.items() if plate is not None]
  objects = list(description.objects)
  i = int(rng.integers(len(objects) + len(there)))
  free = description.free_cells
  cell = free[rng.integers(len(free))]
  if i < len(objects):
    objects[i] = dataclasses.replace(objects[i], cell=cell)
    return _with_objects(description, objects), (i + 1,)
  name = there[i - len(objects)]
  plate, owner = plates[name]
  moved = dataclasses.replace(plate, cell=cell)
  return dataclasses.replace(description, **{name: moved}), (owner,)


def _change_digit(description, rng):
  sign = description.digit
  if sign is None:
    return None
  character = questions.other(rng, layout.DIGITS, sign.character)
  changed = dataclasses.replace(sign, character=character)
  return dataclasses.replace(description, digit=changed), (layout.DIGIT,)


def _change_letter(description, rng):
  sign = description.letter
  if sign is None:
    return None
  character = questions.other(rng, layout.LETTERS, sign.character)
  changed = dataclasses.replace(sign, character=character)
  return dataclasses.replace(description, letter=changed), (layout.LETTER,)


def _change_chart(description, rng):
  """Exchanges the heights of two bars."""
  chart = description.chart
  if chart is None:
    return None
  kept = int(rng.integers(3))
  i, j = (bar for bar in range(3) if bar != kept)
  bars = list(chart.bars)
  (first, low), (second, high) = bars[i], bars[j]
  bars[i], bars[j] = (first, high), (second, low)
  changed = dataclasses.replace(chart, bars=tuple(bars))
  return dataclasses.replace(description, chart=changed), (layout.CHART,)


def _add_object(description, rng):
  objects = list(description.objects)
  if len(objects) == layout.MAX_OBJECTS:
    return None
  free = description.free_cells
  new = layout.Thing(
    size="small",
    colour=_unused(rng, layout.COLOURS, [one.colour for one in objects]),
    texture=layout.TEXTURES[rng.integers(len(layout.TEXTURES))],
    shape=_unused(rng, layout.SHAPES, [one.shape for one in objects]),
    cell=free[rng.integers(len(free))],
  )
  everything = tuple(range(1, len(objects) + 1))
  return _with_objects(description, [*objects, new]), everything


def _drop_object(description, rng):
  objects = list(description.objects)
  small = [i for i, one in enumerate(objects) if one.size == "small"]
  if not small:
    return None
  i = small[rng.integers(len(small))]
  rest = objects[:i] + objects[i + 1 :]
  return _with_objects(description, rest), (i + 1,)


def _unused(rng, options, used):
  rest = [option for option in options if option not in used]
  return rest[rng.integers(len(rest))]


def _fields(thing):
  return {"colour": thing.colour, "shape": thing.shape}


def _with_objects(description, objects):
  ordered = layout.reading_order(objects)
  return dataclasses.replace(description, objects=ordered)


_CHANGES = {
  "colour": _change_colour,
  "shape": _change_shape,
  "texture": _change_texture,
  "place": _change_place,
  "size": _change_size,
  "digit": _change_digit,
  "letter": _change_letter,
  "chart": _change_chart,
  "more": _add_object,
  "fewer": _drop_object,
}
_ALWAYS = ("colour", "shape", "texture", "place")
