"""Makes captions and thoughts that are wrong in exactly one detail.

A wrong caption is the true caption of a scene that differs in one thing, never
an edit of the text, so it reads as any other: in the canonical order and with
the right number of objects named. Each change is a move that leads back with
the same chance, which leaves the uniform distribution of scenes as it is: wrong
captions are distributed as right ones. A wrong answer's thought is the caption
of a scene in which that answer is right, by moves of the same kind.
"""

import dataclasses

import numpy as np

from pivot_jax.data.scenes import descriptions, questions


def describe(
  description: descriptions.Description, rng: np.random.Generator
) -> questions.Question:
  """Ask for the caption; the rejected one is wrong in one detail."""
  wrong, owners = misname(description, rng)
  return questions.Question(
    kind="describe",
    category="general",
    question=questions.DESCRIBE,
    answer=questions.caption(description),
    rejected=questions.caption(wrong),
    owners=owners,
  )


def think(
  description: descriptions.Description,
  asked: questions.Question,
  rng: np.random.Generator,
) -> questions.Question:
  """Return a question whose answers both open with a thought.

  The thought reads everything in the scene aloud, between `<think>` and
  `</think>`, words that occur in no other row; that of the wrong answer reads
  `believed`.
  """
  if asked.kind == "describe":
    thoughts = asked.answer, asked.rejected
  else:
    scenes = description, believed(description, asked, rng)
    thoughts = tuple(map(questions.caption, scenes))
  return dataclasses.replace(
    asked,
    answer=f"<think> {thoughts[0]} </think> {asked.answer}",
    rejected=f"<think> {thoughts[1]} </think> {asked.rejected}",
  )


def believed(
  description: descriptions.Description,
  asked: questions.Question,
  rng: np.random.Generator,
) -> descriptions.Description:
  """Return a scene in which the wrong answer to a question would be right.

  For all kinds but "describe", which has no one answer, and "fact", which no
  picture shows.
  """
  return _BELIEFS[asked.kind](description, asked, rng)


def misname(
  description: descriptions.Description, rng: np.random.Generator
) -> tuple[descriptions.Description, tuple[int, ...]]:
  """Return a scene that differs in one detail, and the things it is about.

  A detail that this scene lacks falls back on one that every scene has: the
  chance of adding an object must not depend on what else is there.
  """
  details = tuple(_CHANGES)
  changed = _CHANGES[details[rng.integers(len(details))]](description, rng)
  if changed is None:
    changed = _CHANGES[_ALWAYS[rng.integers(len(_ALWAYS))]](description, rng)
  return changed


def _exchange(description, rng, field, options):
  """Give an object another value; whoever had that value takes the old."""
  i = int(rng.integers(len(description.objects)))
  old = _fields(description.objects[i])[field]
  return _give(description, i, field, questions.other(rng, options, old))


def _give(description, i, field, new):
  objects = list(description.objects)
  old = _fields(objects[i])[field]
  owners = [i + 1]
  for j, one in enumerate(objects):
    if _fields(one)[field] == new:
      objects[j] = dataclasses.replace(one, **{field: old})
      owners.append(j + 1)
  objects[i] = dataclasses.replace(objects[i], **{field: new})
  return _with_objects(description, objects), tuple(owners)


def _change_colour(description, rng):
  return _exchange(description, rng, "colour", descriptions.COLOURS)


def _change_shape(description, rng):
  return _exchange(description, rng, "shape", descriptions.SHAPES)


def _change_texture(description, rng):
  objects = list(description.objects)
  i = int(rng.integers(len(objects)))
  texture = questions.other(rng, descriptions.TEXTURES, objects[i].texture)
  objects[i] = dataclasses.replace(objects[i], texture=texture)
  return _with_objects(description, objects), (i + 1,)


def _change_size(description, rng):
  """Make another object the large one."""
  objects = list(description.objects)
  if len(objects) == 1:
    return None
  (i,) = (i for i, one in enumerate(objects) if one.size == "large")
  j = questions.other(rng, range(len(objects)), i)
  objects[i] = dataclasses.replace(objects[i], size="small")
  objects[j] = dataclasses.replace(objects[j], size="large")
  return _with_objects(description, objects), (i + 1, j + 1)


def _change_place(description, rng):
  """Move an object, a sign or the chart to a free cell."""
  plates = {
    "digit": (description.digit, descriptions.DIGIT),
    "letter": (description.letter, descriptions.LETTER),
    "chart": (description.chart, descriptions.CHART),
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
  character = questions.other(rng, descriptions.DIGITS, sign.character)
  changed = dataclasses.replace(sign, character=character)
  return dataclasses.replace(description, digit=changed), (descriptions.DIGIT,)


def _change_letter(description, rng):
  sign = description.letter
  if sign is None:
    return None
  character = questions.other(rng, descriptions.LETTERS, sign.character)
  changed = dataclasses.replace(sign, character=character)
  return dataclasses.replace(description, letter=changed), (
    descriptions.LETTER,
  )


def _change_chart(description, rng):
  """Exchange the heights of two bars."""
  chart = description.chart
  if chart is None:
    return None
  kept = int(rng.integers(3))
  i, j = (bar for bar in range(3) if bar != kept)
  bars = list(chart.bars)
  (first, low), (second, high) = bars[i], bars[j]
  bars[i], bars[j] = (first, high), (second, low)
  changed = dataclasses.replace(chart, bars=tuple(bars))
  return dataclasses.replace(description, chart=changed), (descriptions.CHART,)


def _add_object(description, rng):
  objects = list(description.objects)
  if len(objects) == descriptions.MAX_OBJECTS:
    return None
  free = description.free_cells
  new = descriptions.Thing(
    size="small",
    colour=_unused(rng, descriptions.COLOURS, [one.colour for one in objects]),
    texture=descriptions.TEXTURES[rng.integers(len(descriptions.TEXTURES))],
    shape=_unused(rng, descriptions.SHAPES, [one.shape for one in objects]),
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


def _believe_exist(description, asked, rng):
  """A colour that is not there is another object's, as in the question."""
  i = asked.owners[0] - 1
  if asked.rejected == "yes":
    colour = asked.question.split()[3]
  else:
    others = [one.colour for one in description.objects]
    options = others if len(others) > 1 else descriptions.COLOURS
    colour = questions.other(rng, options, others[i])
  return _give(description, i, "colour", colour)[0]


def _believe_colour(description, asked, rng):
  del rng
  return _give(description, asked.owners[0] - 1, "colour", asked.rejected)[0]


def _believe_texture(description, asked, rng):
  del rng
  return _replaced(description, asked.owners[0] - 1, texture=asked.rejected)


def _believe_sign(description, asked, rng):
  del rng
  sign = {"digit": description.digit, "letter": description.letter}[asked.kind]
  changed = dataclasses.replace(sign, character=asked.rejected)
  return dataclasses.replace(description, **{asked.kind: changed})


def _believe_bar(description, asked, rng):
  """Exchange the heights of the two bars."""
  del rng
  heights = dict(description.chart.bars)
  one, two = asked.answer, asked.rejected
  heights[one], heights[two] = heights[two], heights[one]
  chart = dataclasses.replace(description.chart, bars=tuple(heights.items()))
  return dataclasses.replace(description, chart=chart)


def _believe_count(description, asked, rng):
  count = questions.COUNTS.index(asked.rejected) + 1
  while len(description.objects) != count:
    fewer = len(description.objects) > count
    change = _drop_object if fewer else _add_object
    changed = change(description, rng)
    if changed is None:
      raise ValueError(f"no scene of {count} objects to believe in")
    description, _ = changed
  return description


def _believe_relation(description, asked, rng):
  del rng
  i, j = (owner - 1 for owner in asked.owners)
  return _moved(description, i, description.objects[j].cell)


def _believe_size(description, asked, rng):
  """As one object is large, another becomes so, or ceases to be."""
  i = asked.owners[0] - 1
  sizes = [one.size for one in description.objects]
  large = sizes.index("large")
  new = i if large != i else questions.other(rng, range(len(sizes)), i)
  return _replaced(
    _replaced(description, large, size="small"), new, size="large"
  )


def _believe_where(description, asked, rng):
  del rng
  cell = questions.CELLS.index(asked.rejected)
  return _moved(description, asked.owners[0] - 1, cell)


def _moved(description, i, cell):
  """Move an object to a cell; what is there takes the object's."""
  old = description.objects[i].cell
  places = {old: cell, cell: old}

  def move(thing):
    return dataclasses.replace(thing, cell=places.get(thing.cell, thing.cell))

  return descriptions.Description(
    objects=descriptions.reading_order(list(map(move, description.objects))),
    digit=description.digit and move(description.digit),
    letter=description.letter and move(description.letter),
    chart=description.chart and move(description.chart),
  )


def _replaced(description, i, **fields):
  """Change an object in what does not move it."""
  objects = list(description.objects)
  objects[i] = dataclasses.replace(objects[i], **fields)
  return _with_objects(description, objects)


def _unused(rng, options, used):
  rest = [option for option in options if option not in used]
  return rest[rng.integers(len(rest))]


def _fields(thing):
  return {"colour": thing.colour, "shape": thing.shape}


def _with_objects(description, objects):
  ordered = descriptions.reading_order(objects)
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
_BELIEFS = {
  "exist": _believe_exist,
  "colour": _believe_colour,
  "texture": _believe_texture,
  "digit": _believe_sign,
  "letter": _believe_sign,
  "bar": _believe_bar,
  "count": _believe_count,
  "relation": _believe_relation,
  "size": _believe_size,
  "where": _believe_where,
}
