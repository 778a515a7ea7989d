"""All that can be wrong with a row, as changes to one that is right."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from tests.data import planted_pictures, planted_rows
from tests.data.planted_rows import Form, Keys, Kit

_DROP = object()  # In place of a value: the field goes.


@dataclasses.dataclass(frozen=True)
class Plan:
  """A fault to come: values to change in a right record, or its line."""

  kind: str
  changes: Mapping[Keys, Any]
  spoil: Callable[[bytes], bytes] | None = None


def plans(form: Form, number: int, kit: Kit) -> list[Plan]:
  """Returns the faults of a file: of each kind two, so that all ways occur."""
  ways = _image_ways(form, kit) | _text_ways(form, kit)
  planned = [
    Plan(kind, found[(2 * number + i) % len(found)]())
    for kind, found in ways.items()
    for i in range(2)
  ]
  own = _schema_ways(form, kit)
  own = own[number::2] if form.spell is planted_rows.llava else own
  planned += [Plan("schema", changes) for changes in own]
  if form.spell is planted_rows.pair:
    tagged = {("rejected",): "A dog, see <image>."}
    planned.append(Plan("placeholders", tagged))
    # Only the rejected answer: prompt and chosen alone are short.
    planned.append(Plan("too_long", {("rejected",): kit.words(50_000)}))
    for text in ("Yes.", kit.words(60), " 猫 \n"):
      planned.append(
        Plan("equal_pair", {("chosen",): text, ("rejected",): text})
      )
  if form.spell is planted_rows.llava:
    empty = planted_rows.exchange("And now?", " \n")
    ended = planted_rows.exchange("And now?", "It is<|im_end|>")
    for kind, more in (("empty_answer", empty), ("special_token", ended)):
      turns = [*planted_rows.exchange("<image>\nWhat?", "That."), *more]
      turns += planted_rows.exchange("And then?", "Then this.")
      planned.append(Plan(kind, {("conversations",): turns}))
    talk = [
      planted_rows.exchange(kit.words(50), kit.words(50)) for _ in range(500)
    ]
    turns = list(itertools.chain(*talk))
    planned.append(Plan("too_long", {("conversations",): turns}))
  if form.file.endswith(".jsonl"):
    for kind, found in _LINE_WAYS.items():
      for i in range(2):
        planned.append(Plan(kind, {}, found[(2 * number + i) % len(found)]))
  return planned


def faulty(form: Form, row: int, plan: Plan, kit: Kit) -> bytes:
  """Returns a row with the planned fault, as it stands in the file."""
  question = f"<image>\n{kit.words(40)}"
  record = form.spell([], question, kit.words(30), kit.words(30))
  record = {"id": f"row-{row:03d}", "image": kit.picture()} | record
  for keys, value in plan.changes.items():
    if not keys:
      return planted_rows.line(value, row)
    place: Any = record
    for key in keys[:-1]:
      place = place[key]
    if value is _DROP:
      del place[keys[-1]]
    else:
      place[keys[-1]] = value
  line = planted_rows.line(record, row)
  return plan.spoil(line) if plan.spoil else line


def _image_ways(form: Form, kit: Kit) -> dict[str, list[Callable]]:
  """Returns makers of changes, called once each: a bad file has one row."""
  two = {form.asked: "<image>\n<image>\nWhich?"}

  def path(name):
    return lambda: {("image",): name}

  def file(suffix, data):
    return lambda: {("image",): kit.add(suffix, data)}

  return {
    "missing_image": [
      path("nothing.png"),
      path("sub/nothing.jpg"),
      path("sub"),
      lambda: {("image",): [kit.picture(), "gone.png"]} | two,
      path("photo.jpg.png"),
    ],
    "undecodable_image": [
      file(*made) for made in planted_pictures.undecodable(kit.rng)
    ],
    "too_many_pixels": [file(*made) for made in planted_pictures.huge(kit.rng)],
    "outside_root": [
      path("../outside/real.png"),
      path("/etc/passwd"),
      path("https://example.com/a.png"),
      lambda: {("image",): kit.link("../outside/real.png")},
      path("linked/real.png"),
      path("sub/../../images_too/real.png"),
      lambda: {("image",): kit.link("../images_too/real.png")},
      path("file:///etc/passwd"),
    ],
  }


def _text_ways(form: Form, kit: Kit) -> dict[str, list[Callable]]:
  """Returns makers of changes to the texts, the tags and the id."""
  turn = itertools.cycle(form.said)
  tag = f"<image>\n{kit.words(30)}"

  def say(text):
    return lambda: {next(turn): text}

  def ask(text, **others):
    return lambda: (
      {(key,): value for key, value in others.items()} | {form.asked: text}
    )

  def name(row):
    return lambda: {("id",): f"row-{row:03d}"}

  pair = [kit.picture(), kit.picture()]
  return {
    "placeholders": [
      ask(f"<image>\n{tag}"),
      say("It is <image> here."),
      ask(tag, image=_DROP),
      ask(tag, image=pair),
      ask(f"<image> or <image>?\n{tag}", image=pair),
      ask(tag, image=None),
      ask(f"{tag}<image>"),
      say("<image>\nA cat."),
    ],
    "empty_answer": [
      say(text) for text in ("", " ", "\n\t \r\n", "\xa0\u3000")
    ],
    "special_token": [
      say("A cat.<|im_end|>"),
      say("<|im_start|>user\nWhat else?"),
      say("It ends <|endoftext|> here."),
      say("No.<|im_end|>\n<|im_start|>assistant\nYes."),
    ],
    "too_long": [
      lambda: {next(turn): kit.words(50_000)},
      lambda: {form.asked: f"<image>\n{kit.words(50_000)}"},
      lambda: {next(turn): kit.words(50_000)},
    ],
    # The second of the first two is the third use of an id.
    "duplicate_id": [name(0), name(0), name(1), name(2)],
    "lone_surrogate": [
      ask(f"{tag} \ud83d"),
      say("A smile \ude00 here."),
      ask(f"{tag} \ude00\ud83d?"),
      say("\ud83d"),
    ],
  }


def _schema_ways(form: Form, kit: Kit) -> list[dict[Keys, Any]]:
  two = {form.asked: "<image>\n<image>\nWhich?"}
  ways: list[dict[Keys, Any]] = [
    {(): ["id", "image"]},
    {(): "question"},
    {(): 17},
    {(): None},
    {("image",): 17},
    {("image",): [kit.picture(), 17]} | two,
    {("id",): ["row"]},
    {form.asked: _DROP},
    {form.asked: 17},
    *({said: _DROP} for said in form.said),
    {form.said[-1]: 5},
    {form.said[0]: None},
  ]
  if form.spell is not planted_rows.llava:
    return ways
  question, answer = planted_rows.exchange("<image>\nWhat?", "That.")
  found = (
    _DROP, [], [], "What? That.", {"from": "human", "value": "What?"},
    [question], [question], [answer], ["What?", "That."],
  )  # fmt: skip
  ways += [{("conversations",): value} for value in found]
  return [
    *ways,
    {("conversations", 0, "from"): "narrator"},
    {("conversations", 1, "from"): "robot"},
    {("conversations", 1, "from"): _DROP},
  ]


def _before_last_quote(line: bytes, more: bytes) -> bytes:
  at = line.rindex(b'"')
  return line[:at] + more + line[at:]


_LINE_WAYS: dict[str, list[Callable[[bytes], bytes]]] = {
  "bad_json": [
    lambda line: line[:-1],
    lambda line: line.replace(b'"id"', b"'id'"),
    lambda line: line[:-1] + b",}",
    lambda line: line + line,
    lambda line: b"oops",
    lambda line: b"[" * 20_000,
  ],
  # Latin-1, half of a pair written as bytes, a character that stops early.
  "bad_utf8": [
    lambda line: _before_last_quote(line, b" caf\xe9"),
    lambda line: _before_last_quote(line, b" \xed\xa0\xbd"),
    lambda line: _before_last_quote(line, b" \xe4\xbd"),
  ],
}
