"""Pictures under any key: read, or a fault that names the key."""

import base64
import io
import json

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from pivot_jax import addresses
from pivot_jax.data import coders, opener, streams
from pivot_jax.data.sources import json_records, mmpr, records
from pivot_jax.data.sources import parquet as parquet_source
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.data.tools import convert, shown_rows
from pivot_jax.errors import InputError
from tests.data.sources import mmpr_files
from tests.data.tools import checked

TALK = [
  {"from": "human", "value": "Which animal?"},
  {"from": "gpt", "value": "a goat"},
]
PAIR = {"question": "Which animal?", "chosen": "a goat", "rejected": "a hen"}
EXAM = {"question": "Which animal?", "answer": "a goat"}
FORMS = {
  "talk.json": (json_records.LlavaJson, {"conversations": TALK}),
  "pairs.jsonl": (json_records.JsonLines, PAIR),
  "exam.jsonl": (json_records.EvalJson, EXAM),
}


def _png() -> bytes:
  file = io.BytesIO()
  Image.effect_noise((9, 7), 50).save(file, "PNG")
  return file.getvalue()


PNG = _png()


@pytest.fixture
def folder(tmp_path):
  """Return a folder whose `images` has goat.png and hen.png."""
  (tmp_path / "images").mkdir()
  for name in ("goat.png", "hen.png"):
    (tmp_path / "images" / name).write_bytes(PNG)
  return tmp_path


def _write(path, *rows):
  """Write rows as a list or as lines; return the path."""
  if path.suffix == ".json":
    path.write_text(json.dumps(rows))
    return path
  return checked.lines(path, rows)


def _open(folder, name, **fields):
  """Return a source of one row of a form with further fields."""
  kind, row = FORMS[name]
  return kind(_write(folder / name, row | fields), folder / "images")


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
  ("fields", "paths"),
  [
    ({"images": "goat.png"}, "goat.png"),
    ({"images": ["goat.png"]}, "goat.png"),
    ({"images": ["goat.png", "hen.png"]}, ["goat.png", "hen.png"]),
    ({"images": ["goat.png"], "image": None}, "goat.png"),
    ({"images": [], "image": "goat.png"}, "goat.png"),
    ({"images": []}, None),
    ({"images": None}, None),
  ],
)
def test_images_are_read_as_image(folder, name, fields, paths):
  source = _open(folder, name, **fields)
  assert source.text(0)["image"] == paths
  count = len(records.listed(paths))
  assert source.encoded(0) == (PNG,) * count
  shapes = [one.shape for one in records.listed(source[0]["image"])]
  assert len(shapes) == count and all(shape[2] == 3 for shape in shapes)
  source.check_row(0)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
  "fields",
  [
    {"images": 3},
    {"images": {"path": "goat.png"}},
    {"images": ["goat.png", 3]},
    {"images": ["goat.png"], "image": "goat.png"},
  ],
)
def test_what_images_cannot_be_is_a_fault(folder, name, fields):
  with pytest.raises(InputError, match=r"images(\[1\])?: "):
    _open(folder, name, **fields).text(0)


LONG = base64.b64encode(PNG * 2).decode()
UNREAD = {
  "img": "goat.png",
  "image_path": "goat",
  "image_paths": ["goat.png"],
  "imagePath": "goat.png",
  "img_path": "goat.png",
  "video": "goat.mp4",
  "videos": ["goat.mp4"],
  "picture": {"bytes": "", "path": "goat.png"},
  "image_url": {"url": "https://example.org/goat"},
  "image_1": "goat.png",
  "Image": "goat.png",
  "rejected_image": "hen.png",
  "image_base64": "abcd",
  "photo": "goat.png",
  # By their values.
  "file": "farm/goat.JPEG",
  "files": [["a.webp"], "b"],
  "url": "https://example.org/goat.jpg?size=large",
  "visual": f"data:image/png;base64,{LONG}",
  "blob": LONG,
  "meta": {"where": ["goat.png"]},
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("key", UNREAD)
def test_another_key_of_pictures_is_a_fault_that_names_it(folder, name, key):
  source = _open(folder, name, **{key: UNREAD[key]})
  for read in (source.text, source.__getitem__, source.check_row):
    with pytest.raises(
      InputError, match=rf"(:1|#0): {key}: looks like"
    ) as caught:
      read(0)
    assert caught.value.kind == "schema"


@pytest.mark.parametrize(
  "fields",
  [
    {"image_size": [9, 7], "width": 9, "height": 7, "image_id": "goat.png"},
    {"imageId": "000012.jpg", "question_id": "code/0020.png"},
    {"source": "coco", "data_source": "photos/goat.png", "num_images": 0},
    {"img": None, "video": "", "image_path": [], "picture": {"path": None}},
    {"image_caption": "A goat.", "video_id": 17, "has_image": False},
    {"id": "goat.png", "category": "goat.png", "hint": "Think of goats."},
    {"choices": [".png", "a png", "see goat.png\nand answer"], "lang": "en"},
    {"meta": {"name": "a text", "numbers": [1, 2.5, None]}},
  ],
)
@pytest.mark.parametrize("name", FORMS)
def test_a_row_without_pictures_stays_text(folder, name, fields):
  assert _open(folder, name, **fields).text(0)["image"] is None


def test_an_answer_may_be_the_name_of_a_file(folder):
  turns = [TALK[0], {"from": "gpt", "value": "goat.png"}]
  talk = _open(folder, "talk.json", conversations=turns)
  assert talk.text(0)["conversations"] == turns
  for name, field in (("pairs.jsonl", "chosen"), ("exam.jsonl", "answer")):
    row = _open(folder, name, **{field: "goat.png"}).text(0)
    assert row[field] == "goat.png" and row["image"] is None


@pytest.mark.parametrize(
  ("fields", "fault"),
  [
    ({"image_path": "/of/others/goat.png"}, ""),
    ({"image_url": "https://example.org/0017.jpg", "img_name": "x"}, ""),
    ({"url": "https://example.org/0017.jpg", "file": "hen.png"}, ""),
    ({"meta": {"image": ["hen.png"]}}, ""),
    ({"image_path": "hen.png"}, "image_path"),
    ({"video": "goat_1.mp4"}, "video"),
    ({"image_2": "hen.png"}, "image_2"),
    ({"img": "hen.png"}, "img"),
  ],
)
def test_beside_an_image_only_another_picture_is_a_fault(folder, fields, fault):
  source = _open(folder, "pairs.jsonl", image="goat.png", **fields)
  if not fault:
    assert source.text(0)["image"] == "goat.png"
    return
  with pytest.raises(InputError, match=rf":1: {fault}: looks like"):
    source.text(0)


def test_a_picture_of_a_turn_is_a_fault(folder):
  asked = TALK[0] | {"images": ["goat.png"]}
  source = _open(folder, "talk.json", conversations=[asked, TALK[1]])
  with pytest.raises(
    InputError, match=r"conversations\[0\]\.images: looks like"
  ):
    source.text(0)
  weighed = [TALK[0] | {"weight": 1, "loss": True}, TALK[1]]
  assert _open(folder, "talk.json", conversations=weighed).text(0)


def test_mmpr_reads_images_and_refuses_other_keys(tmp_path):
  rows = [
    mmpr_files.row(None, images=["x.png"]),
    mmpr_files.row(None, image_path="x.png"),
  ]
  source = mmpr.Mmpr(mmpr_files.write(tmp_path, {"a": rows}))
  assert source.text(0)["image"] == "images/0/x.png"
  with pytest.raises(InputError, match=r"0\.jsonl:2: image_path: looks like"):
    source.text(1)


# --- parquet ----------------------------------------------------------------

BYTES = {"bytes": PNG, "path": "goat.png"}


def _table(path, *rows):
  parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
  return parquet_source.Parquet(path)


@pytest.mark.parametrize("texts", [{"conversations": TALK}, PAIR, EXAM])
@pytest.mark.parametrize(
  ("column", "value"),
  [
    ("picture", BYTES),
    ("pictures", [BYTES, BYTES]),
    ("scan", BYTES),
    ("jpg", PNG),
    ("Image_0", BYTES),
  ],
)
def test_a_column_of_pictures_that_is_not_read_is_a_fault(
  tmp_path, texts, column, value
):
  with pytest.raises(
    InputError, match=rf"a\.parquet: {column}: looks"
  ) as caught:
    _table(tmp_path / "a.parquet", texts | {column: value})
  assert caught.value.kind == "schema"


@pytest.mark.parametrize("texts", [{"conversations": TALK}, PAIR, EXAM])
@pytest.mark.parametrize("column", ["img", "image_path", "file", "files"])
def test_a_column_of_names_is_a_fault_of_the_rows_that_have_some(
  tmp_path, texts, column
):
  value = ["goat.png"] if column == "files" else "goat.png"
  source = _table(
    tmp_path / "a.parquet", texts | {column: value}, texts | {column: None}
  )
  with pytest.raises(InputError, match=rf"a\.parquet:0: {column}: looks like"):
    source.text(0)
  assert source.text(1)["image"] is None


def test_columns_beside_the_image_are_its_own_affair(tmp_path):
  row = PAIR | {"image": BYTES, "image_path": "x.png", "mask": BYTES}
  assert _table(tmp_path / "a.parquet", row).text(0)["image"] is True
  with pytest.raises(InputError, match="a.parquet: picture: looks like"):
    _table(tmp_path / "a.parquet", row | {"picture": BYTES})
  with pytest.raises(InputError, match="in image and in images"):
    _table(tmp_path / "a.parquet", row | {"images": [BYTES]})


# --- the commands and training -----------------------------------------------


def test_check_names_the_key_of_each_row_and_column(folder):
  rows = [PAIR, PAIR | {"images": ["goat.png"]}, PAIR | {"img": "goat.png"}]
  path = checked.lines(folder / "pairs.jsonl", rows)
  table = folder / "a.parquet"
  parquet.write_table(pyarrow.Table.from_pylist([PAIR | {"img": BYTES}]), table)
  assert checked.check(folder, path, table) == 1
  found = checked.bad(folder)
  assert [(one["file"], one["row"], one["kind"]) for one in found] == [
    (str(table), None, "schema"),
    (str(path), 2, "schema"),
  ]
  assert all("img: looks like" in one["why"] for one in found)
  assert checked.report(folder)["files"][0]["images"] == 1


TOKENIZER = load_tokenizer(addresses.tokenizer_folder("package:toy"))


def test_show_and_convert_refuse_the_row(folder):
  path = _write(folder / "pairs.jsonl", PAIR | {"img": "goat.png"})
  source = opener.open_path(path, image_root=str(folder / "images"))
  shown = shown_rows.look(source, 0, shown_rows.Style(TOKENIZER))
  assert len(shown.errors) == 1 and "img: looks like" in shown.errors[0]
  with pytest.raises(InputError, match="img: looks like"):
    convert.main([str(path), str(folder / "out"), "--images", str(folder)])


def test_convert_keeps_the_pictures_of_images(folder):
  path = _write(folder / "pairs.jsonl", PAIR | {"images": ["goat.png"]})
  target = folder / "out"
  convert.main([str(path), str(target), f"--images={folder / 'images'}"])
  source = opener.open_source({"kind": "array_record", "path": str(target)})
  assert source.encoded(0) == (PNG,)


def test_training_reads_images_and_stops_at_another_key(folder):
  coder = coders.Coder(
    tokenizer=TOKENIZER, template="qwen_1_5", mask="paper", pairs=True,
    image_size=8, patches=4, resample="bicubic", max_length=2048, long="error",
  )  # fmt: skip
  spec = {"kind": "preference", "image_root": str(folder / "images")}

  def stream(**fields):
    path = _write(folder / "pairs.jsonl", PAIR | fields)
    parts = [(spec | {"path": str(path)}, 1.0)]
    return streams.open_stream(parts, coder, seed=0)

  assert stream(images=["goat.png"]).example(0).images[0].shape == (8, 8, 3)
  assert stream().example(0).images == ()
  with pytest.raises(InputError, match="img: looks like"):
    stream(img="goat.png").example(0)
