"""Decides what is in a scene and where, and has it painted.

A `Description` is the content alone (all that captions and questions need, a
few microseconds); a `Scene` adds the picture and the map of who owns which
pixel. Nothing here writes a sentence: that is `questions.py`. Draws follow one
rule that the text relies on: given how many objects there are, every shape,
colour, texture, digit, letter, bar and cell is uniform, so an answer tells
nothing that the picture does not.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int8, Int32, UInt8

from pivot_jax.data.scenes import drawing

COLOURS = tuple(drawing.COLOURS)
SHAPES = drawing.SHAPES
TEXTURES = drawing.TEXTURES
SIZES = ("large", "small")
LEVELS = tuple(drawing.LEVELS)
DIGITS = tuple("0123456789")
LETTERS = tuple("ehjklptwxy")
MAX_OBJECTS = 4

# Owners of pixels: 0 is the background, 1..4 the objects in reading order.
DIGIT, LETTER, CHART = 5, 6, 7

LABELS = ("background", *SHAPES, "sign", "chart")  # classes of `Scene.labels`


@dataclasses.dataclass(frozen=True)
class Thing:
  """One object: four words and its cell, 0..8 in reading order."""

  size: str
  colour: str
  texture: str
  shape: str
  cell: int


@dataclasses.dataclass(frozen=True)
class Sign:
  """A plate with one digit or one letter."""

  character: str
  cell: int


@dataclasses.dataclass(frozen=True)
class Chart:
  """Three bars from left to right, each a colour and a level."""

  bars: tuple[tuple[str, str], ...]
  cell: int


@dataclasses.dataclass(frozen=True)
class Description:
  """The content of a scene; `objects` are in reading order of their cells."""

  objects: tuple[Thing, ...]
  digit: Sign | None
  letter: Sign | None
  chart: Chart | None

  @property
  def label(self) -> int:
    """The shape of the one large object, as an index into `SHAPES`."""
    (large,) = (thing for thing in self.objects if thing.size == "large")
    return SHAPES.index(large.shape)

  @property
  def free_cells(self) -> tuple[int, ...]:
    things = (*self.objects, self.digit, self.letter, self.chart)
    taken = {thing.cell for thing in things if thing is not None}
    return tuple(cell for cell in range(9) if cell not in taken)


@dataclasses.dataclass(frozen=True)
class Scene:
  """A painted description; `boxes` are (top, left, bottom, right) of objects."""

  description: Description
  image: UInt8[np.ndarray, "48 48 3"]
  owners: Int8[np.ndarray, "48 48"]
  boxes: tuple[tuple[int, int, int, int], ...]

  @property
  def labels(self) -> Int32[np.ndarray, "48 48"]:
    """The class of each pixel, an index into `LABELS`."""
    sign, chart = LABELS.index("sign"), LABELS.index("chart")
    classes = np.zeros(8, np.int32)
    classes[[DIGIT, LETTER, CHART]] = sign, sign, chart
    for owner, thing in enumerate(self.description.objects, 1):
      classes[owner] = 1 + SHAPES.index(thing.shape)
    return classes[self.owners]

  def mask(self, owners: tuple[int, ...]) -> Bool[np.ndarray, "48 48"]:
    """Return the visible pixels of some of the scene's things."""
    wanted = np.zeros(8, bool)
    wanted[list(owners)] = True
    return wanted[self.owners]


def sample(
  rng: np.random.Generator,
  *,
  needs: tuple[str, ...] = (),
) -> Description:
  """Draw the content of a scene.

  Args:
    rng: where the draws come from; the number of draws is the same for all.
    needs: what must be there, of "pair" (two objects or more), "digit",
      "letter" and "chart". Without it there are 1 to 4 objects, uniformly, and
      each of the rest with probability one half.
  """
  fewest = 2 if "pair" in needs else 1
  # One call for all draws: it is most of what a description costs.
  draws = rng.random(42)
  count = fewest + int(draws[0] * (MAX_OBJECTS + 1 - fewest))
  cells = draws[6:15].argsort().tolist()
  shapes = draws[15:23].argsort()
  colours = draws[23:29].argsort()
  textures = (draws[29:33] * len(TEXTURES)).astype(int)
  bars = draws[33:39].argsort()[:3]
  levels = draws[39:42].argsort()
  things = [
    Thing(
      size=SIZES[i > 0],
      colour=COLOURS[colours[i]],
      texture=TEXTURES[textures[i]],
      shape=SHAPES[shapes[i]],
      cell=cells[i],
    )
    for i in range(count)
  ]
  digit = Sign(DIGITS[int(draws[1] * 10)], cells[4])
  letter = Sign(LETTERS[int(draws[2] * len(LETTERS))], cells[5])
  chart = Chart(
    tuple((COLOURS[bar], LEVELS[level]) for bar, level in zip(bars, levels)),
    cells[6],
  )
  return Description(
    objects=reading_order(things),
    digit=digit if draws[3] < 0.5 or "digit" in needs else None,
    letter=letter if draws[4] < 0.5 or "letter" in needs else None,
    chart=chart if draws[5] < 0.5 or "chart" in needs else None,
  )


def reading_order(things: list[Thing]) -> tuple[Thing, ...]:
  """Sort objects by cell: left to right, then top to bottom."""
  return tuple(sorted(things, key=lambda thing: thing.cell))


def paint(description: Description, rng: np.random.Generator) -> Scene:
  """Draw the picture: places, hues and noise come from `rng`."""
  image = drawing.background(rng)
  owners = np.zeros((drawing.SIDE, drawing.SIDE), np.int8)
  boxes = _paint_objects(image, owners, description.objects, rng)
  _paint_plates(image, owners, description, rng)
  image += rng.standard_normal(image.shape, np.float32) * 5
  pixels = np.clip(image, 0, 255).astype(np.uint8)
  return Scene(description, pixels, owners, boxes)


def _paint_objects(image, owners, objects, rng):
  """Paint in random order; neighbours may overlap by a few pixels."""
  jitter = rng.integers(-1, 2, (len(objects), 2))
  grow = rng.integers(2, size=len(objects))
  boxes = [(0, 0, 0, 0)] * len(objects)
  for i in rng.permutation(len(objects)).tolist():
    thing = objects[i]
    pixels = int((16 if thing.size == "large" else 11) + grow[i])
    top, left = _corner(thing.cell, pixels, pixels, jitter[i])
    drawing.paint_shape(
      image,
      owners,
      owner=i + 1,
      shape=thing.shape,
      texture=thing.texture,
      colour=_hue(thing.colour, rng),
      top=top,
      left=left,
      pixels=pixels,
    )
    boxes[i] = (top, left, top + pixels, left + pixels)
  return tuple(boxes)


def _paint_plates(image, owners, description, rng):
  jitter = rng.integers(-1, 2, (3, 2))
  inks = rng.uniform((215, 15), (245, 55), (2, 2))
  signs = ((DIGIT, description.digit), (LETTER, description.letter))
  for place, (owner, sign) in enumerate(signs):
    if sign is not None:
      top, left = _corner(sign.cell, 16, 14, jitter[place])
      drawing.paint_sign(
        image,
        owners,
        owner=owner,
        character=sign.character,
        ink=tuple(inks[place]),
        top=top,
        left=left,
      )
  chart = description.chart
  if chart is not None:
    top, left = _corner(chart.cell, 16, 16, jitter[2])
    bars = [(_hue(colour, rng), level) for colour, level in chart.bars]
    drawing.paint_chart(
      image, owners, owner=CHART, bars=bars, top=top, left=left
    )


def _corner(cell, height, width, jitter):
  """The top left pixel of a box near its cell's middle, inside the image."""
  row, column = divmod(cell, 3)
  top = drawing.CELL * row + (drawing.CELL - height) // 2 + int(jitter[0])
  left = drawing.CELL * column + (drawing.CELL - width) // 2 + int(jitter[1])
  return (
    min(max(top, 0), drawing.SIDE - height),
    min(max(left, 0), drawing.SIDE - width),
  )


def _hue(colour, rng):
  base = np.array(drawing.COLOURS[colour], np.float32)
  return base + rng.uniform(-10, 10, 3).astype(np.float32)
