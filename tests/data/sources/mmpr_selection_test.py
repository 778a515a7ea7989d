"""The rows of MMPR that make up the paper's sets, and the lists of them."""

import functools
import json
import random

import pytest
from PIL import Image

from pivot_jax import addresses
from pivot_jax.configs import paper_data
from pivot_jax.data import chat, opener
from pivot_jax.data.sources import mmpr_selection
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError
from tests.data.sources import mmpr_files

TOKENIZER = load_tokenizer(addresses.tokenizer_folder("package:toy"))
row, numbered, words = mmpr_files.row, mmpr_files.numbered, mmpr_files.words


@pytest.fixture
def write(tmp_path):
  """Write {name: rows} as MMPR is published; return its meta.json."""
  return functools.partial(mmpr_files.write, tmp_path)


def official(meta, count=words, **wish):
  return mmpr_selection.select_official(meta, meta.parents[1], count, **wish)


def fixed(meta, count=words, **wish):
  return mmpr_selection.select_fixed(meta, None, count, **wish)


def chosen(selection, field="chosen"):
  source = selection.open()
  return [source.text(i)[field] for i in range(len(source))]


# --- the official selection --------------------------------------------------


def test_the_order_is_that_of_shuffling_the_rows_themselves(write):
  files = {name: numbered(40, chosen=name) for name in ("a", "b", "c")}
  selection = official(write(files), size=50)
  rows = [(k, i) for k in range(3) for i in range(40)]
  random.seed(777)
  random.shuffle(rows)
  assert selection.rows == tuple(rows[:50]) and not selection.refused
  asked = chosen(selection, "question")
  assert asked == [f"what {i} ?" for _, i in rows[:50]]


def test_the_seed_makes_the_order_and_sizes_are_nested(write):
  meta = write({"a": numbered(60)})
  rows = official(meta, size=30).rows
  assert official(meta, size=10).rows == rows[:10]
  assert official(meta, size=30, seed=1111).rows != rows


def test_a_file_ends_at_its_first_list_of_images(write):
  """Also a list of one; a text that speaks of such a list does not count."""
  spoken = row(question='"image": ["x.png"]', meta={"image": ["x.png"]})
  late = [*numbered(3), spoken, row(image=["x.png"]), *numbered(9)]
  meta = write({"a": late, "b": [row(image=["x.png", "y.jpg"])], "c": [row()]})
  selection = official(meta, size=5)
  assert set(selection.rows) == {(0, 0), (0, 1), (0, 2), (0, 3), (2, 0)}
  with pytest.raises(InputError, match="only 5 of 6 rows fit the set"):
    official(meta, size=6)


def test_the_list_may_be_in_the_last_line_without_a_newline(write):
  meta = write({"a": [*numbered(2), row(image=["x.png"])]})
  path = meta.parent / "annotations/0.jsonl"
  path.write_text(path.read_text().rstrip("\n"))
  assert set(official(meta, size=2).rows) == {(0, 0), (0, 1)}


def test_rows_are_refused_for_three_reasons_and_these_are_counted(write):
  # 1498 words, `<image>` and "q" make 1500, the most that is allowed.
  fits, long = "w " * 1498, "w " * 1499
  rows = [
    row(image="gone.png"),
    row(image="gone.png", chosen="<image>"),
    row(chosen="an <image>"),
    row(rejected="an <image>"),
    row(question="q", chosen=long),
    row(question="q", chosen=fits, rejected=long + long),
    row(question="<image>\nq", chosen=fits),
    row(chosen="", rejected=""),
  ]
  meta = write({"a": rows})
  assert set(official(meta, size=3).rows) == {(0, 5), (0, 6), (0, 7)}
  match = "only 3 of 4 .*: 2 <image> in an answer, 2 image missing, 1 too long$"
  with pytest.raises(InputError, match=match):
    official(meta, size=4)


def test_what_is_refused_is_counted_only_as_far_as_it_was_walked(write):
  meta = write({"a": [row(image="gone.png"), *numbered(19)]})
  order = list(range(20))
  random.Random(777).shuffle(order)
  place = order.index(0)
  assert official(meta, size=place).refused == {}
  assert official(meta, size=place + 1).refused == {"image missing": 1}


@pytest.mark.parametrize(
  ("image", "match"),
  [
    (None, "no image: the released script stops"),
    ("z.webp", "stops at .*webp"),
    ("part/y.JPG", r"stops at .*y\.JPG"),
    ("x.GIF", r"stops at .*x\.GIF"),
    ("y.jpg/jpg", "stops at .*jpg/jpg"),
  ],
)
def test_the_script_stops_where_it_is_said_to(write, image, match):
  meta = write({"a": [row(image=image)]})
  with pytest.raises(InputError, match=rf"0\.jsonl:1: .*{match}"):
    official(meta, size=1)


def test_a_gif_is_taken_for_its_jpg(write):
  meta = write({"a": [row(image="y.gif"), row(image="x.gif")]})
  Image.new("L", (5, 5)).save(meta.parent / "images/0/x.gif")
  selection = official(meta, size=1)
  assert chosen(selection, "image") == ["images/0/y.jpg"]
  assert selection.open()[0]["image"].shape == (2, 3, 3)


def test_images_that_are_nowhere_are_one_error(write):
  meta = write({"a": numbered(3)}, root="pictures")
  with pytest.raises(InputError, match="has no folder pictures.*give the fold"):
    official(meta, size=1)
  with pytest.raises(InputError, match="has no folder pictures"):
    fixed(meta, size=1)


# --- the fixed selection -----------------------------------------------------


def test_without_trouble_both_choose_the_same(write):
  meta = write({"a": numbered(40), "b": numbered(40)})
  assert fixed(meta, size=50).rows == official(meta, size=50).rows


def test_rows_are_refused_one_by_one_for_counted_reasons(write):
  long = "w " * 1500
  bad = {
    "cannot be read": ["{broken", row(chosen=3), "[]"],
    "several images": [row(image=["x.png", "y.jpg"])],
    "no image": [row(image=None)],
    "image missing": [row(image="gone.png"), row(image="../../up.png")],
    "unknown kind of image": [row(image="x.svg")],
    "other number of <image> than of images": [row(question="<image><image>")],
    "empty answer": [row(rejected=" \n")],
    "equal answers": [
      row(chosen="a", rejected="a"),
      row(chosen="\u00e5", rejected="a\u030a"),
    ],
    "special token in an answer": [
      row(chosen="an <image>"),
      row(rejected="a<|im_end|>"),
    ],
    "too long": [row(chosen=long), row(rejected=long)],
  }
  good = [row(image=["x.png"]), row(image="z.webp"), row(question="<image>?")]
  rows = [one for many in bad.values() for one in many] + good
  meta = write({"a": rows})
  assert {i for _, i in fixed(meta, size=3).rows} == {16, 17, 18}
  counted = ", ".join(f"{len(bad[why])} {why}" for why in sorted(bad))
  with pytest.raises(InputError) as caught:
    fixed(meta, size=4)
  assert str(caught.value).endswith(
    f"only 3 of 4 rows fit the set; refused: {counted}"
  )


def test_text_and_several_images_are_taken_if_asked_for(write):
  two = row(image=["x.png", "y.jpg"], question="<image> or <image> ?")
  rows = [row(image=None), two, row()]
  meta = write({"a": rows})
  for options, there in (
    (dict(), {2}),
    (dict(text_only=True), {0, 2}),
    (dict(several=True), {1, 2}),
    (dict(text_only=True, several=True), {0, 1, 2}),
  ):
    selection = fixed(meta, size=len(there), **options)
    assert {i for _, i in selection.rows} == there


@pytest.mark.parametrize("images", [0, 1, 2, 3])
@pytest.mark.parametrize("tags", [0, 1, 2, 3])
def test_tags_are_as_many_as_training_takes(write, images, tags):
  paths = ["x.png", "y.jpg", "z.webp"][:images]
  one = row(image=paths, question="<image> " * tags + "what ?")
  meta = write({"a": [one]})
  options = dict(size=1, text_only=True, several=True)
  try:
    chat.encode_pair(
      TOKENIZER, one["question"], "a cat", "a dog", template="qwen_1_5",
      mask="paper", images=images,
    )  # fmt: skip
  except InputError:
    with pytest.raises(InputError, match="1 other number of <image> than of"):
      fixed(meta, **options)
  else:
    assert fixed(meta, **options).rows == ((0, 0),)


@pytest.mark.parametrize("select", [official, fixed])
def test_a_row_is_chosen_once_whatever_its_repeat_time(write, select, tmp_path):
  (tmp_path / "other").mkdir()
  files = {"a": numbered(30), "b": numbered(30)}
  meta = write(files, repeat_time=3)
  other = mmpr_files.write(tmp_path / "other", files)
  assert select(meta, size=60).rows == select(other, size=60).rows
  with pytest.raises(InputError, match="only 60 of 61 rows"):
    select(meta, size=61)


# --- the sets of 4.6 and 4.7 -------------------------------------------------


@pytest.mark.parametrize(
  ("answer", "new"),
  [
    ("w " * 100, False),
    ("w " * 101, True),
    ("<think> so </think> yes", True),
    ("<review>\nso\n</review> yes", True),
    ("I think so", False),
  ],
)
def test_new_answers_are_long_or_think_aloud(answer, new):
  assert mmpr_selection.is_new(answer) == new


@pytest.fixture
def mixed(write):
  """60 rows: every third is long, every fourth thinks aloud, short or not."""
  return write({
    "a": [
      row(
        chosen=("<think> </think> " if i % 4 == 0 else "")
        + "w " * (120 if i % 3 == 0 else 20 + i % 30)
      )
      for i in range(60)
    ]
  })  # fmt: skip


@pytest.mark.parametrize("select", [official, fixed])
@pytest.mark.parametrize(("share", "new"), [(0, 0), (0.5, 10), (0.8, 16)])
def test_a_share_of_the_rows_is_new_in_the_seeded_order(
  mixed, select, share, new
):
  selection = select(mixed, size=20, new_fraction=share)
  marks = [mmpr_selection.is_new(answer) for answer in chosen(selection)]
  assert sum(marks) == new and len(marks) == 20
  everything = [i for _, i in select(mixed, size=60).rows]
  taken = [i for _, i in selection.rows]
  for mark in (True, False):
    of_kind = [i for i in everything if (i % 3 == 0 or i % 4 == 0) == mark]
    own = [i for i, m in zip(taken, marks) if m == mark]
    assert own == of_kind[: len(own)]
  assert taken == sorted(taken, key=everything.index)


def test_a_larger_set_holds_the_smaller_one_if_not_at_its_start(mixed):
  def rows(size, **wish):
    return official(mixed, size=size, **wish).rows

  for name in mmpr_selection.SETS:
    wish = mmpr_selection.asked_of(name)
    smaller, larger = rows(5, **wish), rows(10, **wish)
    assert set(smaller) < set(larger), name
    if "new_fraction" not in wish:
      assert larger[:5] == smaller
  # Others are taken where there are enough new ones already.
  assert rows(20, new_fraction=0.5)[:10] != rows(10, new_fraction=0.5)


@pytest.mark.parametrize("select", [official, fixed])
def test_friendly_sets_are_all_that_is_short_and_does_not_think(mixed, select):
  # Row 8 has 28 words and two tags, which count as words: 30.
  short = {1, 2, 4, 5, 7, 31, 32, 34, 35, 37, 38}
  assert {i for _, i in select(mixed, size=11, only="under30").rows} == short
  plain = {i for i in range(60) if i % 3 and i % 4}
  assert {i for _, i in select(mixed, size=30, only="nothink").rows} == plain
  for only, size in (("under30", 12), ("nothink", 31)):
    with pytest.raises(InputError, match=f"only {size - 1} of {size} rows"):
      select(mixed, size=size, only=only)


@pytest.mark.parametrize(
  ("wish", "match"),
  [
    (dict(size=0), "size=0"),
    (dict(only="over30"), "only='over30': choose one of"),
    (dict(new_fraction=2.0), r"new_fraction=2\.0: give one in 0 \.\. 1"),
    (dict(new_fraction=0.5, only="under30"), "not both"),
  ],
)
def test_wishes_that_cannot_be_are_refused(mixed, wish, match):
  with pytest.raises(InputError, match=match):
    official(mixed, **wish)


def test_a_set_is_asked_for_by_name():
  asked = [mmpr_selection.asked_of(name) for name in mmpr_selection.SETS]
  assert asked == [
    {}, {"new_fraction": 0.0}, {"new_fraction": 0.5}, {"new_fraction": 0.8},
    {"only": "under30"}, {"only": "nothink"},
  ]  # fmt: skip
  assert mmpr_selection.asked_of("new_12.5") == {"new_fraction": 0.125}
  for name in ("over30", "new_101", "new_", ""):
    with pytest.raises(InputError, match=f"--set={name}: choose one of"):
      mmpr_selection.asked_of(name)


# --- the lists ----------------------------------------------------------------


def test_the_lists_hold_the_same_rows_in_lock_step(write, tmp_path):
  meta = write({"a": numbered(5), "b": [row(question="so <image>\nwhat ?")]})
  selection = official(meta, size=6)
  mmpr_selection.write(selection, tmp_path / "out", {})
  sft, dpo = (
    json.loads((tmp_path / f"out/{kind}_mmpr_6_777.json").read_text())
    for kind in ("sft", "dpo")
  )
  place = selection.rows.index((0, 2))
  assert sft[place] == {
    "id": "a/2",
    "image": "MMPR-v1.2/images/0/x.png",
    "conversations": [
      {"from": "human", "value": "<image>\nwhat 2 ?"},
      {"from": "gpt", "value": "a cat"},
    ],
    "data_source": "a",
  }
  assert dpo[place] == {
    "id": "a/2",
    "prompt": "<image>\nwhat 2 ?",
    "chosen": "a cat",
    "rejected": "a dog",
    "image": "MMPR-v1.2/images/0/x.png",
  }
  assert dpo[selection.rows.index((1, 0))]["prompt"] == "so <image>\nwhat ?"
  for one, two in zip(sft, dpo, strict=True):
    assert (one["id"], one["image"]) == (two["id"], two["image"])
    asked, answered = (turn["value"] for turn in one["conversations"])
    assert (asked, answered) == (two["prompt"], two["chosen"])


@pytest.mark.parametrize("select", [official, fixed])
def test_training_reads_of_the_list_what_was_chosen(write, select, tmp_path):
  """Tokens and pixels of each row, in the order of the choice."""
  rows = [*numbered(5), row(image="y.gif", question="and <image> ?")]
  selection = select(write({"a": rows}), size=6)
  _, dpo = mmpr_selection.write(selection, tmp_path / "out", {})
  entry = paper_data.mmpr(
    str(tmp_path / "out"), size=6, image_root=str(selection.image_root)
  )
  assert entry["path"] == str(dpo)
  listed, live = opener.open_source(entry), selection.open()
  for index in range(6):
    ours, theirs = listed.text(index), live.text(index)
    assert ours["id"] == theirs["id"]
    assert (listed[index]["image"] == live[index]["image"]).all()
    assert _tokens(ours) == _tokens(theirs)


def _tokens(pair):
  found = chat.encode_pair(
    TOKENIZER, pair["question"], pair["chosen"], pair["rejected"],
    template="qwen_1_5", mask="paper", images=1,
  )  # fmt: skip
  return repr(found)


@pytest.mark.parametrize("root", ["images/0", "MMPR-v1.2/images/0"])
@pytest.mark.parametrize("moved", [False, True])
def test_images_are_found_from_the_root_that_is_told(
  write, tmp_path, root, moved
):
  meta = write({"a": numbered(2)}, root=root)
  images = None
  if moved:
    images = tmp_path / "elsewhere"
    (images / root).parent.mkdir(parents=True)
    (meta.parent / "images/0").rename(images / root)
  selection = mmpr_selection.select_official(
    meta, None, words, size=2, image_root=images
  )
  mmpr_selection.write(selection, tmp_path / "out", {"set": "official"})
  told = json.loads((tmp_path / "out/selection.json").read_text())
  assert (told["set"], told["rows"], told["refused"]) == ("official", 2, {})
  entry = paper_data.mmpr(
    str(tmp_path / "out"), size=2, image_root=told["image_root"]
  )
  assert opener.open_source(entry)[0]["image"].shape == (2, 3, 3)


def test_the_lists_are_whole_or_not_there(write, tmp_path):
  meta = write({"a": numbered(5)})
  selection = official(meta, size=5)
  out = tmp_path / "out"
  out.mkdir()
  (out / "mine").write_text("mine")
  with pytest.raises(InputError, match="out: exists and is not empty"):
    mmpr_selection.write(selection, out, {})
  assert [path.read_text() for path in out.iterdir()] == ["mine"]
  with pytest.raises(InputError, match="meta.json: exists"):
    mmpr_selection.write(selection, meta, {})
  with pytest.raises(InputError, match="meta.json/a: cannot be written"):
    mmpr_selection.write(selection, meta / "a", {})
  # A row that cannot be read any more.
  path = meta.parent / "annotations" / "0.jsonl"
  path.write_text(path.read_text().replace("a cat", "3")[:-20])
  before = sorted(tmp_path.iterdir())
  with pytest.raises(InputError):
    mmpr_selection.write(selection, tmp_path / "other", {})
  assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["mmpr", "preference"])
@pytest.mark.parametrize(
  "field", ["selection", "set", "size", "tokenizer", "new_fraction", "only"]
)
def test_a_config_that_chooses_rows_is_refused(write, kind, field):
  spec = dict(kind=kind, path=str(write({"a": [row()]})))
  assert len(opener.open_source(spec)) == 1
  with pytest.raises(InputError, match=f"{field}: .*select-mmpr") as refused:
    opener.open_source(spec | {field: "all"})
  assert "\n" not in str(refused.value)


def test_an_entry_names_the_list_of_its_size_and_seed():
  assert paper_data.mmpr("data/under30") == dict(
    kind="preference",
    path="data/under30/dpo_mmpr_20000_777.json",
    image_root="datasets",
  )
  with pytest.raises(ValueError, match="name: .*select-mmpr"):
    paper_data.mmpr("meta.json", tokenizer="t", name="under30")
