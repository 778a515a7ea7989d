import json
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from pivot_jax import addresses
from pivot_jax.data import chat, coders
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.data.tools import show, shown_page, shown_rows
from pivot_jax.errors import InputError

TOY = load_tokenizer(addresses.tokenizer_folder("package:toy"))
STYLE = shown_rows.Style(TOY, image_tokens=36)
PLAIN = show.Look(columns=60)
GREY = np.full((4, 6, 3), 128, np.uint8)
TURNS = [
  {"from": "human", "value": "<image>\nhow many"},
  {"from": "gpt", "value": "one"},
]
PAIR = {"question": "how many", "chosen": "one", "rejected": "two"}
SYSTEM_PAPER = """\
<|im_start|>system↵
^~~~~~~~~~~~.     ^
You are a helpful assistant.<|im_end|>↵
.  .   . .       .         ..         ^
<|im_start|>user↵
^~~~~~~~~~~~.   ^
[image: 36 tokens]↵
.                 ^
"""
SYSTEM_READ = SYSTEM_PAPER.replace("^", ".").replace("~", " ")


class Rows(list):
  """Rows in memory, as a source; an exception stands for an image's fault."""

  def __getitem__(self, index):
    row = super().__getitem__(index)
    if isinstance(row["image"], InputError):
      raise InputError(f"{self.name(index)}: {row['image']}")
    return row

  def text(self, index):
    row = super().__getitem__(index)
    image = row["image"]
    many = ["a.png"] * len(image) if isinstance(image, list) else "a.png"
    return row | {"image": None if image is None else many}

  def name(self, index):
    return f"rows.jsonl:{index + 1}"


def _look(style=STYLE, **row):
  return shown_rows.look(Rows([{"id": "x", "image": GREY} | row]), 0, style)


def _text(style=STYLE, **row) -> str:
  return show.draw_row(_look(style, **row), PLAIN)


def test_a_conversation_is_shown_with_what_the_paper_learns():
  assert _text(conversations=TURNS) == (
    "== rows.jsonl:1\n"
    "id x\n"
    "image a.png 6x4\n"
    "prompt 55 tokens (7 learnt), answer 6 tokens (6 learnt);"
    " 61 tokens with 1 image\n"
    f"-- prompt\n{SYSTEM_PAPER}"
    "how many<|im_end|>↵\n"
    ".  .    .         ^\n"
    "-- answer\n"
    "<|im_start|>assistant↵\n"
    "^~~~~~~~~~~~^~~~~~~~~^\n"
    "one<|im_end|>↵\n"
    "^~~^~~~~~~~~~^\n"
  )


def test_a_preference_row_is_shown_with_both_answers():
  style = shown_rows.Style(TOY, mask="answer", image_tokens=36)
  assert _text(style, **PAIR) == (
    "== rows.jsonl:1\n"
    "id x\n"
    "image a.png 6x4\n"
    "prompt 55 tokens (0 learnt), chosen 6 tokens (2 learnt),"
    " rejected 6 tokens (2 learnt); 67 tokens with 1 image\n"
    f"-- prompt\n{SYSTEM_READ}"
    "how many<|im_end|>↵\n"
    ".  .    .         .\n"
    "-- chosen\n"
    "<|im_start|>assistant↵\n"
    ".           .        .\n"
    "one<|im_end|>↵\n"
    "^~~^~~~~~~~~~.\n"
    "-- rejected\n"
    "<|im_start|>assistant↵\n"
    ".           .        .\n"
    "two<|im_end|>↵\n"
    "^~~^~~~~~~~~~.\n"
  )


def test_sft_on_a_preference_row_names_the_answer_it_leaves_out():
  style = shown_rows.Style(TOY, objective="sft", image_tokens=36)
  shown = _look(style, **PAIR)
  assert [part.title for part in shown.parts] == ["prompt", "chosen"]
  assert shown.fields == (("rejected, not read by sft", "two"),)


def test_all_pairs_of_a_row_are_shown_and_numbered():
  row = {**PAIR, "chosen": ["one", "1"], "rejected": ["two", "2"]}
  titles = [part.title for part in _look(**row).parts]
  pairs = ["chosen 1", "rejected 1", "chosen 2", "rejected 2"]
  assert titles == ["prompt", *pairs]
  shown = _look(shown_rows.Style(TOY, objective="sft"), **row)
  assert [p.title for p in shown.parts] == ["prompt", "chosen 1", "chosen 2"]
  assert [text for _, text in shown.fields] == ["two", "2"]


def test_an_evaluation_row_is_shown_as_its_prompt():
  row = dict(question="how many", answer="one", category="c", kind="k")
  assert _text(**row) == (
    "== rows.jsonl:1\n"
    "id x\n"
    "image a.png 6x4\n"
    "prompt 58 tokens (0 learnt); 58 tokens with 1 image\n"
    f"-- prompt\n{SYSTEM_READ}"
    "how many<|im_end|>↵\n"
    ".  .    .         .\n"
    "<|im_start|>assistant↵\n"
    ".           .        .\n"
    "answer: one\n"
    "category: c\n"
    "kind: k\n"
  )


def test_rows_without_text_are_shown_by_their_labels():
  head = "== rows.jsonl:1\nid x\nimage a.png 6x4\n"
  assert _text(label=3) == head + "label: 3\n"
  labels = np.array([[0, 0, 0, 2]], np.int32)
  said = "label map 4x1\nlabels: 0: 75.0 %, 2: 25.0 %\n"
  assert _text(labels=labels) == head + said


@pytest.mark.parametrize("mask", chat.MASKS)
@pytest.mark.parametrize("row", [
  dict(conversations=TURNS),
  dict(conversations=[*TURNS, *TURNS], image=[GREY, GREY]),
  dict(conversations=[TURNS[1], {"from": "human", "value": "\nhow"}, TURNS[1]],
       image=None),
  PAIR,
  PAIR | dict(chosen="\n\none \n", rejected="日本🤗\ufffd", image=None),
])  # fmt: skip
def test_what_is_shown_as_learnt_is_what_is_learnt(row, mask):
  row = {"id": "x", "image": GREY} | row
  style = shown_rows.Style(TOY, mask=mask)
  coder = coders.Coder(
    tokenizer=TOY, template="qwen_1_5", mask=mask, pairs="chosen" in row,
    image_size=8,
  )  # fmt: skip
  shown = shown_rows.look(Rows([row]), 0, style)
  assert not shown.errors
  encoded = coder.encode(row)
  sequences = [encoded.prompt, *encoded.answers]
  flags = [encoded.prompt_targets, *encoded.answer_targets]
  for part, ids, targets in zip(shown.parts, sequences, flags, strict=True):
    found = [(i, t.target) for t in part.tokens for i in t.ids]
    assert found == list(zip(ids.tolist(), targets.tolist()))
    ends = np.cumsum([0, *(len(t.ids) for t in part.tokens)])
    assert [token.at for token in part.tokens] == ends[:-1].tolist()
    assert part.targets == targets.sum()
    learnt = "".join(t.text for t in part.tokens if t.target)
    for look in (PLAIN, PLAIN._replace(colour=True)):
      assert _marked(part, look) == shown_rows.one_line(learnt)


def _marked(part, look) -> str:
  """Return the characters that lines show as learnt."""
  lines = show.draw(part.tokens, look)
  if look.colour:
    pieces = re.findall(r"\x1b\[([\d;]+)m([^\x1b]*)\x1b\[0m", "".join(lines))
    return "".join(text for codes, text in pieces if codes.startswith("1;32"))
  found = ""
  for line, marks in zip(lines[::2], lines[1::2]):
    column = 0
    for character in line:
      found += character if marks[column : column + 1] in ("^", "~") else ""
      column += shown_rows.width(character)
  return found


@hypothesis.given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_the_texts_of_tokens_are_the_text(text):
  ids = np.asarray(TOY.encode(text), np.int32)
  flags = np.zeros(len(ids), bool)
  found = shown_rows.read_tokens(TOY, ids, flags, iter(()))
  assert "".join(token.text for token in found) == TOY.decode(ids)
  assert [i for token in found for i in token.ids] == ids.tolist()


def test_text_that_spells_a_special_token_is_not_shown_as_one():
  shown = _look(conversations=[
    {"from": "human", "value": "<|im_end|> <|im_start|>"}, TURNS[1],
  ])  # fmt: skip
  special = [token for token in shown.parts[0].tokens if token.special]
  assert [token.text for token in special] == [
    "<|im_start|>", "<|im_end|>", "<|im_start|>", "[image: 36 tokens]",
    "<|im_end|>",
  ]  # fmt: skip


def test_several_images_are_numbered_through_the_turns():
  turns = [*TURNS, {"from": "human", "value": "<image>\nthis"}, TURNS[1]]
  text = _text(conversations=turns, image=[GREY, GREY[:2]])
  assert "image 1 a.png 6x4\nimage 2 a.png 6x2\n" in text
  assert re.findall(r"\[image.*?\]", text) == [
    "[image 1: 36 tokens]", "[image 2: 36 tokens]",
  ]  # fmt: skip
  assert "-- answers\n" in text and "with 2 images\n" in text


def test_a_row_with_a_fault_is_shown_as_far_as_it_can_be():
  text = _text(conversations=TURNS, image=InputError("image: no such file"))
  assert "error: image: no such file\n" in text and "-- answer\n" in text
  text = _text(**PAIR | {"chosen": " "})
  assert "error: chosen: an answer is empty; remove the row\n" in text
  assert "question: how many\n" in text and "-- " not in text
  text = _text(shown_rows.Style(TOY, objective="dpo"), conversations=TURNS)
  assert "error: 'question'" in text and "human: <image>↵how many\n" in text


def test_no_text_acts_on_the_terminal_or_hides():
  evil = "\x1b[31m\x07\u202e\u200b\r\x9b"
  text = _text(**PAIR | {"question": evil}, id=f"i{evil}")
  assert not re.search(r"[^\n -~↵]", text)
  for look in (PLAIN, show.Look(columns=60, colour=True)):
    drawn = show.draw_row(_look(conversations=TURNS, id=evil), look)
    assert not re.search("[\x07\x9b\u202e\u200b\r]|\x1b\\[31m", drawn)


def test_lines_are_as_wide_as_the_terminal_and_break_between_tokens():
  words = "how many objects are there ? " * 5 + "日本" * 30
  shown = _look(**PAIR | {"question": words})
  lines = show.draw(shown.parts[0].tokens, PLAIN)
  sizes = [sum(map(shown_rows.width, line)) for line in lines]
  assert max(sizes) <= PLAIN.columns and max(sizes) >= PLAIN.columns - 1
  assert {marks[0] for marks in lines[1::2]} == {"."}
  narrow = show.draw(shown.parts[0].tokens, show.Look(7))
  assert narrow[:6] == ["<|im_st", ".", "art|>", "", "system↵", ".     ."]


def test_a_page_holds_no_markup_of_the_data():
  evil = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"
  rows = [
    _look(**PAIR | {"chosen": evil, "question": evil}, id=evil),
    _look(**PAIR | {"chosen": evil, "rejected": evil}),
    _look(question="q", answer=evil, category=evil, kind=evil),
  ]
  page = shown_page.page(evil, [shown_page.section(evil, evil, rows)])
  tags = set(re.findall(r"<(\w+)", page.split("</head>")[1]))
  assert tags <= set(
    "body main h1 h2 h3 h4 p section article div span i dl dt dd figure img"
    " figcaption".split()
  )
  assert not re.search(r"<[^>]*onerror", page)
  images = re.findall('<img [^>]* src="data:image/png;base64,[^"]*">', page)
  assert len(images) == page.count("<img") == 3
  assert "&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#x27;&amp;&lt;img" in page
  assert page.count("http-equiv") == 1 and "default-src 'none'" in page
  assert "url(" not in page and "http://" not in page


def test_a_page_tells_targets_ids_and_places():
  shown = _look(**PAIR)
  found = re.findall(
    r'<i class="([^"]*)" data-t="chosen, token (\d+): id (\d+), ([^"]*)">',
    shown_page.tokens(shown.parts[1]),
  )
  ids = [token.ids[0] for token in shown.parts[1].tokens]
  assert [(int(at), int(i)) for _, at, i, _ in found] == list(enumerate(ids))
  assert {kind.split()[0] for kind, *_ in found} == {"l"}
  assert {said for *_, said in found} == {"learnt"}


def test_a_large_picture_is_inlined_small():
  noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), np.uint8)
  drawn = shown_page.picture(shown_rows.Picture("<a>", noise))
  assert 'width="512" height="384"' in drawn and "&lt;a&gt;" in drawn
  assert "data:image/jpeg" in drawn and len(drawn) < 400_000


def test_half_blocks_have_the_colours_of_the_picture():
  pixels = np.zeros((2, 2, 3), np.uint8)
  pixels[0, :, 0], pixels[1, :, 2] = 200, 100
  lines = show.half_blocks(pixels)
  assert len(lines) == show.PICTURE[0] // 2
  assert lines[0].startswith("\x1b[38;2;200;0;0;48;2;200;0;0m▀")
  assert lines[-1].endswith("\x1b[38;2;0;0;100;48;2;0;0;100m▀\x1b[0m")


@pytest.mark.parametrize("colour, environment, is_terminal, expected", [
  (None, {}, False, (False, False)),
  (None, {"COLORTERM": "truecolor"}, False, (False, False)),
  (None, {"COLORTERM": "truecolor"}, True, (True, True)),
  (None, {"TERM": "xterm"}, True, (True, False)),
  (None, {"TERM": "dumb"}, True, (False, False)),
  (None, {"NO_COLOR": "1", "COLORTERM": "truecolor"}, True, (False, False)),
  (True, {"COLORTERM": "24bit"}, False, (True, True)),
  (False, {"COLORTERM": "24bit"}, True, (False, False)),
])  # fmt: skip
def test_colour_and_pictures_are_for_terminals(
  colour, environment, is_terminal, expected
):
  look = show.terminal(colour, environment, is_terminal=is_terminal)
  assert (look.colour, look.pictures) == expected


def test_rows_are_chosen_by_seed_first_or_number():
  rows = Rows([{"id": str(i), "image": None} for i in range(40)])

  def choose(count=5, *, first=False, seed=0, numbers=()):
    choice = show.Choice(count, first, seed, numbers)
    return show.choose(rows, choice, "f")

  assert choose() == choose() == sorted(set(choose())) != choose(seed=1)
  assert len(choose()) == 5 and choose(100) == list(range(40))
  assert choose(3, first=True) == [0, 1, 2]
  assert choose(numbers=(7, 3)) == [7, 3]
  with pytest.raises(InputError, match="f: has no row 40; give 0 to 39"):
    choose(numbers=(40,))


@pytest.fixture
def file(tmp_path):
  """Return preference lines, the third without its image."""
  for name in ("0.png", "1.png"):
    Image.fromarray(GREY).save(tmp_path / name)
  path = tmp_path / "rows.jsonl"
  lines = [
    {"id": f"r{i}", "image": f"{i}.png", **PAIR, "question": f"é {i}"}
    for i in range(3)
  ]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
  return path


def test_the_command_shows_a_file_without_colour_where_there_is_no_terminal(
  file, capsys
):
  assert show.main([str(file), "--row=1", "--row=0"]) == 0
  said = capsys.readouterr().out
  assert "\x1b" not in said
  assert re.findall(r"^== (.*)", said, re.M) == [f"{file}:2", f"{file}:1"]
  assert "mask paper" in said and "^~~ a token that is learnt" in said
  assert show.main([str(file), "--row=0", "--color"]) == 0
  assert "\x1b[1;32m" in capsys.readouterr().out


def test_a_row_that_cannot_be_read_makes_the_status_1(file, capsys):
  assert show.main([str(file), "--row=2"]) == 1
  said = capsys.readouterr().out
  assert re.search("^error: image: .*2.png: no such file$", said, re.M)
  assert "-- rejected" in said


def test_a_line_that_is_no_record_is_shown_as_such(file, capsys):
  with file.open("a", encoding="utf-8") as lines:
    lines.write("{no\n")
  assert show.main([str(file), "--row=3", "--row=0"]) == 1
  said = capsys.readouterr().out
  assert f"== {file}:4\nerror: invalid JSON" in said
  assert f"== {file}:1\nid r0\n" in said


def test_the_command_writes_a_page(file, tmp_path, capsys):
  out = tmp_path / "out.html"
  assert show.main([str(file), f"--html={out}", "--n=9"]) == 1
  assert capsys.readouterr().out == f"{out}: 3 rows, 1 with an error\n"
  page = out.read_text("utf-8")
  assert page.count("<article>") == 3 and page.count("<img ") == 2
  with pytest.raises(InputError, match="--html=.*: No such file"):
    show.main([str(file), f"--html={tmp_path / 'no' / 'a.html'}"])


def test_a_terminal_without_unicode_gets_escapes(file, monkeypatch):
  with open(file.parent / "said", "w+", encoding="ascii") as out:
    monkeypatch.setattr("sys.stdout", out)
    assert show.main([str(file), "--row=0"]) == 0
    out.seek(0)
    assert "\\u21b5" in out.read()
