"""Pins whole numbers that no reorganisation may change, in golden/pins.json.

  python -m tests.golden_batches write

Packed batches of every kind of source, the order of a mixed stream, the ids of
conversations, and the bytes of exported weights. None of them is a result of a
training: they do not depend on the CPU or on threads. The tokenizer of Qwen2 is
in PIVOT_JAX_TEST_DATA; without it its pins are kept as they are.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from pivot_jax import addresses, sharding
from pivot_jax.data import __main__ as data_command
from pivot_jax.data import chat, feed, opener, packing, streams
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError
from pivot_jax.weights import export
from tests.fixtures import published, published_parts

PINS = pathlib.Path(__file__).parent / "golden" / "pins.json"
UPDATES, BATCH, SIDE, PATCHES = 20, 4, 48, 36
QWEN = "tokenizer_qwen2"
SHIPPED = "package:toy/stage1"
Spec = Mapping[str, str | int | float | bool]


@dataclasses.dataclass(frozen=True)
class Reading:
  """A source and how a training reads it."""

  spec: Spec
  pairs: bool = False
  template: str = "qwen_1_5"


# Readings of files, whose names are known before the files are there.
FILES = (
  "LLaVA JSON",
  "JSON lines, DPO",
  "JSON lines, SFT",
  "grouped, DPO",
  "grouped, SFT",
  "mixture",
  "MMPR, DPO",
  "MMPR, SFT",
  "parquet",
  "ArrayRecord",
)


def scenes() -> dict[str, Reading]:
  """Return a reading of each task that a training reads."""

  def scene(task, **fields):
    return dict(kind="scenes", task=task, size=50, **fields)

  thinking = scene("preference", new_fraction=0.5)
  return {
    "scenes caption": Reading(scene("caption")),
    "scenes caption plain": Reading(
      scene("caption", split="pretrain"), template="plain"
    ),
    "scenes chat": Reading(scene("chat", turns=4)),
    "scenes text": Reading(scene("text", turns=5)),
    "scenes preference, DPO": Reading(scene("preference"), pairs=True),
    "scenes preference, SFT": Reading(scene("preference")),
    "scenes preference thinking, DPO": Reading(thinking, pairs=True),
  }


def files(folder: pathlib.Path) -> dict[str, Reading]:
  """Return readings of small files of every kind, written to a folder."""
  captions = published.make_llava_pretrain(folder, rows=12)
  mixture = published.make_onevision_mixture(folder)
  mmpr = published.make_mmpr(folder)
  parquet = published.make_onevision(folder)
  lines = mmpr.root / "annotations" / "ai2d_prefix_pair.jsonl"
  pairs = dict(
    kind="preference", path=str(lines), image_root=str(mmpr.root / "images")
  )
  grouped = dict(kind="preference", path=str(group(folder)), group=True)
  llava = dict(
    kind="llava", path=str(captions.path), image_root=str(captions.root)
  )
  records = folder / "records"
  data_command.main(
    ["convert", llava["path"], str(records), f"--images={llava['image_root']}"]
  )
  meta = dict(kind="mmpr", path=str(mmpr.path))
  return {
    "LLaVA JSON": Reading(llava),
    "JSON lines, DPO": Reading(pairs, pairs=True),
    "JSON lines, SFT": Reading(pairs),
    "grouped, DPO": Reading(grouped, pairs=True),
    "grouped, SFT": Reading(grouped),
    "mixture": Reading(
      dict(kind="mixture", path=str(mixture.path), image_root=str(mixture.root))
    ),
    "MMPR, DPO": Reading(meta, pairs=True),
    "MMPR, SFT": Reading(meta),
    "parquet": Reading(dict(kind="llava", path=str(parquet.path))),
    "ArrayRecord": Reading(dict(kind="llava", path=str(records))),
  }


def group(folder: pathlib.Path) -> pathlib.Path:
  """Write pairs of which one to four share image and question."""
  rng = np.random.default_rng(0)
  rows = []
  for number in range(8):
    image = f"{number}.png"
    published_parts.put(
      folder / "grouped" / image, published_parts.picture(rng, "PNG")
    )
    question = published_parts.words(rng, 3, 9)
    for answer in range(number % 4 + 1):
      texts = [published_parts.words(rng, 3, 20) for _ in range(2)]
      names = dict(zip(("chosen", "rejected"), texts))
      rows.append(
        dict(id=f"{number}-{answer}", image=image, question=question, **names)
      )
  lines = "".join(f"{json.dumps(row)}\n" for row in rows)
  path = folder / "grouped" / "pairs.jsonl"
  published_parts.put(path, lines.encode())
  return path


def batches(reading: Reading) -> list[int]:
  """Return a CRC32 over all arrays of each of the first updates."""
  stream, coder = opened([(reading.spec, 1.0)], reading)
  layout = feed.choose_layout(
    stream,
    coder,
    pack=dict(tokens=0, losses=0, images=1, row=0, row_images=0),
    batch=BATCH,
    steps=UPDATES,
    shards=1,
  )
  updates = feed.updates(
    stream,
    layout,
    batch=BATCH,
    start=0,
    mesh=one_device(),
    sft_group=2,
    threads=2,
  )
  return [crc(update.batch) for update in itertools.islice(updates, UPDATES)]


def crc(batch: packing.Batch) -> int:
  """Return a CRC32 of names, types, shapes and bytes of a batch's arrays."""
  value = 0
  for name, field in batch._asdict().items():
    array = np.asarray(jax.device_get(field))
    head = f"{name} {array.dtype} {array.shape}"
    value = zlib.crc32(head.encode(), value)
    value = zlib.crc32(array.tobytes(), value)
  return value


def order() -> str:
  """Return SOURCE/ROW at 200 positions of a weighted stream of two sources."""
  found = scenes()
  parts = [
    (found["scenes chat"].spec | dict(size=9), 7.0),
    (found["scenes text"].spec | dict(size=5), 1.0),
  ]
  stream, _ = opened(parts, found["scenes chat"])
  places = [stream.place(position) for position in range(200)]
  return " ".join(f"{part}/{row}" for part, row in places)


def tokens(folder: str | os.PathLike) -> dict[str, list[int]]:
  """Return the ids of conversations, the targets' flags, pairs and prompts."""
  tokenizer = load_tokenizer(folder)
  talk = [
    {"from": "human", "value": "<image>\nWhat is it, über <|im_end|>?"},
    {"from": "gpt", "value": "A red circle.\n\nAnd 12 more: naïve."},
    {"from": "human", "value": "  And left of it?"},
    {"from": "gpt", "value": "Nothing"},
  ]
  caption = [
    {"from": "human", "value": "<image>\nDescribe."},
    {"from": "gpt", "value": "two blue cups"},
  ]
  found = {}
  for template in ("qwen_1_5", "qwen2_5", "plain"):
    turns = caption if template == "plain" else talk
    for mask in ("paper", "answer"):
      style = dict(template=template, mask=mask)
      name = f"{template} {mask}"
      one = chat.encode_conversation(tokenizer, turns, **style)
      found |= _named(f"{name} conversation", one)
      pair = ("Is it <image> red?", "Yes, it is.", "No.")
      if template != "plain":
        one = chat.encode_pair(tokenizer, *pair, **style)
        found |= _named(f"{name} pair", one)
  one = chat.encode_prompt(tokenizer, "How many?", images=1)
  return found | _named("question", one)


def exports(folder: pathlib.Path) -> dict[str, str]:
  """Return the SHA-256 of each exported file, but of the cards."""
  found = {}
  for form in ("hf", "timm", "big_vision", "llava"):
    out = export.export(SHIPPED, folder / form, format=form)
    for path in sorted(out.rglob("*")):
      if path.is_file() and path.name != "README.md":
        name = path.relative_to(folder).as_posix()
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
  return found


def opened(
  parts: Sequence[tuple[Spec, float]], reading: Reading
) -> tuple[feed.Stream, feed.Coder]:
  """Return the stream of sources as a training opens it, and its coder."""
  coder = feed.Coder(
    tokenizer=load_tokenizer(toy()),
    template=reading.template,
    mask="paper",
    pairs=reading.pairs,
    image_size=SIDE,
    patches=PATCHES,
    max_length=2048,
    long=opener.long_rows("auto", [spec for spec, _ in parts]),
  )
  return streams.open_stream(parts, coder, seed=11), coder


def toy() -> pathlib.Path:
  """Return the folder of the shipped tokenizer."""
  return addresses.tokenizer_folder("package:toy")


def one_device() -> jax.sharding.Mesh:
  """Return a mesh of one device, however many there are."""
  device = np.asarray(jax.devices()[:1]).reshape(1, 1, 1)
  return jax.sharding.Mesh(device, sharding.AXES)


def all_pins(kept: Mapping[str, object]) -> dict[str, object]:
  """Return every pin, of the Qwen2 tokenizer those kept if it is not there."""
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    readings = scenes() | files(folder / "data")
    found = {
      "batches": {name: batches(one) for name, one in readings.items()},
      "order": order(),
      "tokens toy": tokens(toy()),
      "exports": exports(folder / "exports"),
    }
  if "PIVOT_JAX_TEST_DATA" in os.environ:
    place = pathlib.Path(os.environ["PIVOT_JAX_TEST_DATA"], QWEN)
    return found | {"tokens qwen2": tokens(place)}
  if "tokens qwen2" not in kept:
    raise InputError(f"set PIVOT_JAX_TEST_DATA to the folder of {QWEN}")
  return found | {"tokens qwen2": kept["tokens qwen2"]}


def read() -> dict:
  """Return the kept pins."""
  return json.loads(PINS.read_text("utf-8")) if PINS.exists() else {}


def main(argv: Sequence[str]) -> int:
  """Write the pins of the present code."""
  if list(argv) != ["write"]:
    sys.stderr.write(f"{__doc__}\n")
    return 2
  text = json.dumps(all_pins(read()), sort_keys=True)
  # A line for each list or value.
  lines = text.replace("], ", "],\n").replace("}, ", "},\n")
  PINS.write_text(lines.replace('", "', '",\n"') + "\n", encoding="utf-8")
  return 0


def _named(name: str, encoded: chat.Encoded) -> dict[str, list[int]]:
  """Return the arrays of an encoded text by name, flags as 0 and 1."""
  parts: dict[str, np.ndarray | list[int]] = {
    "prompt": encoded.prompt,
    "prompt targets": encoded.prompt_targets,
  }
  for number, (answer, flags) in enumerate(
    zip(encoded.answers, encoded.answer_targets)
  ):
    parts |= {f"answer {number}": answer, f"answer {number} targets": flags}
  return {
    f"{name}, {part}": np.asarray(array).astype(int).tolist()
    for part, array in parts.items()
  }


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
