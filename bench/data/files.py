"""Data files as large as the published ones, of made-up text, written fast.

A text is a run of words out of one long pool, so that making it costs a slice.
Word lengths, punctuation and the share of rare words are set for Qwen2.5's
tokenizer to give about `TOKENS_A_WORD`. What lies where depends on the seed
alone.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm

from bench import images

TOKENS_A_WORD = 1.37
# Words of a LLaVA question and an answer, tokens of an MMPR row: means of
# log-normal draws, and the standard deviation of their logarithms.
QUESTION, ANSWER, SPREAD = 25, 60, 0.9
PAIR, PAIR_SPREAD = {"question": 70, "chosen": 280, "rejected": 309}, 0.6
# Shares of conversations by turns, and of rows without an image.
TURNS = (0.7, 0.15, 0.08, 0.05, 0.02)
TEXT_ONLY = 0.1
PICTURES, SIDES, QUALITY = 6, (640, 480), 88
FILES = 6  # JSON lines of a MMPR folder.
SEED = 0

_POOL = 2_000_000  # Words.
_BLOCK = 20_000  # Rows that are drawn and written at once.
_RARE = 0.17
_COMMON = (
  "the of and a to in is you that it he was for on are as with his they I at be"
  " this have from or one had by word but not what all were we when your can"
  " said there use an each which she do how their if will up other about out"
  " many then them these so some her would make like him into time has look two"
  " more write go see number no way could people my than first water been call"
  " who oil its now find long down day did get come made may part image shows"
  " picture left right red blue white green black table chart value man woman"
  " holding standing near background large small answer question option because"
  " therefore between shown color building street person wearing visible total"
  " difference according following information example children something"
  " through because different important another without against number country"
  " including together position several surface original question triangle"
  " continue remember calculate percentage government university development"
).split()
_SYLLABLES = (
  "ab al an ar be bo ca co cra da de di do el en er fi fo ga gra ha hi il in ka"
  " la le lo ma me mi mo na ne no ol or pa per pi po ra re ri ro sa se si so sta"
  " ta te ti to tra ul un va ve vi vo za"
).split()
_SUFFIXES = ("", "ed", "ing", "tion", "s", "ly", "er", "ment")


class Pool:
  """One long text of words, and where each of them begins in its bytes."""

  def __init__(self, rng: np.random.Generator, words: int = _POOL):
    stock = np.array([*_COMMON, *_rare(rng, 20_000)], object)
    # Few of the words are most of the text, common and rare ones apart.
    common = (len(_COMMON) * rng.random(words) ** 2).astype(int)
    rare = len(_COMMON) + (20_000 * rng.random(words) ** 3).astype(int)
    chosen = stock[np.where(rng.random(words) < _RARE, rare, common)].tolist()
    ends = rng.choice(
      [" ", ", ", ". ", r".\n", r" \"", " – "],
      words,
      p=[0.87, 0.05, 0.06, 0.013, 0.005, 0.002],
    ).tolist()
    pieces = [f"{word}{end}".encode() for word, end in zip(chosen, ends)]
    self._begins = np.cumsum([0, *map(len, pieces)]).tolist()
    self._text = b"".join(pieces)
    self.words = words

  def text(self, first: int, count: int) -> bytes:
    """Return `count` words from word `first` on, as JSON spells them."""
    begins = self._begins
    # A last letter, so that no text ends in white space.
    return self._text[begins[first] : begins[first + count]] + b"x"


def _rare(rng: np.random.Generator, count: int) -> list[str]:
  """Return made-up words of one to three syllables and an ending."""
  lengths = rng.integers(1, 4, count).tolist()
  syllables = iter(rng.choice(_SYLLABLES, 3 * count).tolist())
  endings = rng.choice(_SUFFIXES, count).tolist()
  numbers = rng.integers(0, 1000, count).tolist()
  return [
    "".join(next(syllables) for _ in range(length)) + ending
    if number >= 50
    else str(number)
    for length, ending, number in zip(lengths, endings, numbers)
  ]


def write_pictures(folder: pathlib.Path) -> list[str]:
  """Write the few photographs that all rows share; return their names."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(SEED)
  names = [f"{number}.jpg" for number in range(PICTURES)]
  for name in names:
    images.photograph(rng, *SIDES).save(folder / name, quality=QUALITY)
  return names


def write_llava(path: pathlib.Path, rows: int) -> None:
  """Write a JSON list of conversations about images/*.jpg beside it."""
  names = write_pictures(path.parent / "images")
  rng = np.random.default_rng(SEED)
  pool = Pool(rng)
  with path.open("wb") as file:
    file.write(b"[\n")
    for block in _blocks(rows, path.name):
      made = list(_conversations(rng, pool, block, names))
      file.write(b",\n".join(made))
      file.write(b",\n" if block.stop < rows else b"\n]\n")


def write_mmpr(folder: pathlib.Path, pairs: int) -> pathlib.Path:
  """Write a folder as published, `FILES` annotations; return its meta.json.

  Every second of them has ids.
  """
  base = folder / "MMPR-v1.2"
  (base / "annotations").mkdir(parents=True)
  rng = np.random.default_rng(SEED)
  pool = Pool(rng)
  meta = {}
  for number in range(FILES):
    root = f"images/part{number}"
    names = write_pictures(base / root)
    rows = pairs * (number + 1) // FILES - pairs * number // FILES
    path = base / "annotations" / f"part{number}.jsonl"
    with path.open("wb") as file:
      for block in _blocks(rows, path.name):
        made = _pairs(rng, pool, block, names, with_ids=number % 2 == 0)
        file.writelines(made)
    meta[f"part{number}"] = {
      "root": f"MMPR-v1.2/{root}",
      "annotation": f"MMPR-v1.2/annotations/{path.name}",
      "length": rows,
    }
  (base / "meta.json").write_text(json.dumps(meta, indent=1))
  return base / "meta.json"


def _blocks(rows: int, name: str) -> Iterator[range]:
  starts = range(0, rows, _BLOCK)
  with tqdm.tqdm(total=rows, desc=f"writing {name}", unit="row") as bar:
    for start in starts:
      block = range(start, min(start + _BLOCK, rows))
      yield block
      bar.update(len(block))


def lengths(
  rng: np.random.Generator, mean: float, spread: float, count: int
) -> np.ndarray:
  """Return log-normal whole numbers of this mean, 1 or more."""
  location = np.log(mean) - spread**2 / 2
  return np.maximum(1, rng.lognormal(location, spread, count).astype(int))


def _texts(rng, pool: Pool, mean: float, spread: float, count: int):
  """Return texts of so many words on average."""
  words = np.minimum(lengths(rng, mean, spread, count), 4000)
  places = rng.integers(0, pool.words - 4000, count)
  return list(map(pool.text, places.tolist(), words.tolist()))


def _conversations(rng, pool, block: range, names: Sequence[str]):
  count = len(block)
  turns = 1 + rng.choice(len(TURNS), count, p=TURNS)
  asked = iter(_texts(rng, pool, QUESTION, SPREAD, int(turns.sum())))
  answers = iter(_texts(rng, pool, ANSWER, SPREAD, int(turns.sum())))
  shown = rng.integers(0, len(names), count)
  shown[rng.random(count) < TEXT_ONLY] = -1
  for index, many, picture in zip(block, turns.tolist(), shown.tolist()):
    head = b'{"id": "made-%08d", ' % index
    tag = b""
    if picture >= 0:
      head += b'"image": "images/%s", ' % names[picture].encode()
      tag = rb"<image>\n"
    said = []
    for _ in range(many):
      said.append(b'{"from": "human", "value": "%s%s"}' % (tag, next(asked)))
      said.append(b'{"from": "gpt", "value": "%s"}' % next(answers))
      tag = b""
    yield head + b'"conversations": [%s]}' % b", ".join(said)


def _pairs(rng, pool, block: range, names: Sequence[str], *, with_ids: bool):
  count = len(block)
  fields = [
    _texts(rng, pool, tokens / TOKENS_A_WORD, PAIR_SPREAD, count)
    for tokens in PAIR.values()
  ]
  pictures = rng.integers(0, len(names), count).tolist()
  for index, picture, *texts in zip(block, pictures, *fields):
    given = b'"id": %d, ' % index if with_ids else b""
    yield (
      b'{%s"image": "%s", "question": "%s", "chosen": "%s", "rejected": "%s"}\n'
      % (given, names[picture].encode(), *texts)
    )
