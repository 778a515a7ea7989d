"""The columns of lmms-lab's evaluation sets, and random rows for them.

A maker returns a row's image files, its columns, and the row that
`parquet.Parquet` makes of them, without `image`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.data import published_parts as parts


def _mme(rng, index):
  # Two questions about an image have one id, as published.
  name = f"code_reasoning/{index // 2:04d}.png"
  files = [parts.picture(rng, "PNG")]
  said = {
    "question": parts.words(rng, 4, 9),
    "answer": "Yes" if index % 2 else "No",
  }
  columns = {"question_id": name, **said, "category": "code_reasoning"}
  row = {
    "id": f"{name}#2" if index % 2 else name,
    **said,
    "category": "code_reasoning",
    "columns": columns,
  }
  return files, {**columns, "image": parts.struct(files, name)}, row


def _mmbench(rng, index):
  files = [parts.picture(rng)]
  columns = {
    "index": 1000 + index,
    "question": parts.words(rng, 4, 9),
    "hint": "nan" if index % 2 else parts.words(rng, 3, 6),
    **{letter: parts.words(rng, 1, 3) for letter in "ABC"},
    "D": "nan",
    "answer": "ABC"[index % 3],
    "category": "ocr",
    "source": "reasonseg",
    "l2-category": "finegrained_perception",
    "comment": "nan",
    "split": "dev",
  }
  row = {key: columns[key] for key in ("question", "answer", "category")}
  row |= {"id": str(1000 + index), "columns": columns}
  return files, {**columns, "image": parts.struct(files, None)}, row


def _scienceqa(rng, index):
  files = [] if index % 3 == 2 else [parts.picture(rng, "PNG")]
  columns = {
    "question": parts.words(rng, 4, 9),
    "choices": [parts.words(rng, 1, 3) for _ in range(3)],
    "answer": index % 3,
    "hint": "",
    "category": "Materials",
    "lecture": parts.words(rng, 5, 20),
  }
  row = {
    "id": f"test-00000-of-00001-{index}",
    "question": columns["question"],
    "answer": str(index % 3),
    "category": "Materials",
    "columns": columns,
  }
  return files, {**columns, "image": parts.struct(files, "image.png")}, row


def _textvqa(rng, index):
  files = [parts.picture(rng)]
  columns = {
    "image_id": f"{index:016x}",
    "question_id": 34602 + index,
    "question": parts.words(rng, 4, 9),
    "answers": ["nokia"] * 3 + ["toshiba"] * 4 + ["nokia", "x", "y"],
    "ocr_tokens": ["MIA", "NOKIA"] if index % 2 else [],
  }
  row = {
    "id": str(34602 + index),
    "question": columns["question"],
    # Four of each: the earlier one.
    "answer": "nokia",
    "columns": columns,
  }
  return files, {**columns, "image": parts.struct(files, None)}, row


def _vqav2(rng, index):
  files = [parts.picture(rng)]
  texts = ["net"] * 3 + ["racket"] * 4 + ["net", "x", "y"]
  columns = {
    "question_type": "what is",
    "multiple_choice_answer": "net",
    "answers": texts,
    "image_id": 262148 + index,
    "answer_type": "other",
    "question_id": 262148000 + index,
    "question": parts.words(rng, 4, 9),
  }
  row = {
    "id": str(262148000 + index),
    "question": columns["question"],
    "answer": "net",
    "columns": columns,
  }
  answers = [
    {"answer": text, "answer_confidence": "yes", "answer_id": k}
    for k, text in enumerate(texts, 1)
  ]
  record = columns | {"answers": answers, "image": parts.struct(files, None)}
  return files, record, row


def _docvqa(rng, index):
  files = [parts.picture(rng, "PNG")]
  columns = {
    "questionId": str(49153 + index),
    "question": parts.words(rng, 4, 9),
    "question_types": ["figure/diagram"],
    "docId": 14465,
    "answers": ["0.28", "0,28"],
    "data_split": "val",
  }
  row = {
    "id": columns["questionId"],
    "question": columns["question"],
    "answer": "0.28",
    "columns": columns,
  }
  return files, {**columns, "image": parts.struct(files, None)}, row


def _seed_bench(rng, index):
  files = [parts.picture(rng) for _ in range(1 + index % 3)]
  columns = {
    "answer": "B",
    **{f"choice_{letter}": parts.words(rng, 1, 3) for letter in "abcd"},
    "data_type": "image",
    "question": parts.words(rng, 4, 9),
    "question_id": f"v1_{index}",
  }
  row = {key: columns[key] for key in ("question", "answer")}
  row |= {"id": f"v1_{index}", "columns": columns}
  structs = [{"bytes": data, "path": None} for data in files]
  return files, {**columns, "image": structs}, row


def _mmmu(rng, index):
  files = [parts.picture(rng, "PNG") for _ in range(1 + index % 2)]
  columns = {
    "id": f"validation_Art_{index}",
    "question": f"<image 1> {parts.words(rng, 4, 9)}",
    "options": "['a', 'b']",
    "answer": "A",
    "question_type": "multiple-choice",
  }
  row = {key: columns[key] for key in ("id", "question", "answer")}
  structs = {
    f"image_{k}": parts.struct(files[k - 1 : k], None) for k in range(1, 8)
  }
  return files, {**columns, **structs}, row | {"columns": columns}


def _types(text: str, **others) -> dict[str, Any]:
  return {name: parts.TEXT for name in text.split()} | others


Maker = Callable[[np.random.Generator, int], tuple[list[bytes], dict, dict]]
EVALUATIONS: dict[str, tuple[str, Maker, dict[str, Any]]] = {
  "MME": (
    "test",
    _mme,
    _types("question_id question answer category", image=parts.IMAGE),
  ),
  "MMBench_EN": (
    "dev",
    _mmbench,
    {"index": parts.INT}
    | _types(
      "question hint A B C D answer category source l2-category comment split",
      image=parts.IMAGE,
    ),
  ),
  "ScienceQA": (
    "test",
    _scienceqa,
    _types(
      "question hint category lecture",
      choices=parts.TEXTS,
      answer=parts.INT8,
      image=parts.IMAGE,
    ),
  ),
  "textvqa": (
    "validation",
    _textvqa,
    _types(
      "image_id question",
      question_id=parts.INT,
      answers=parts.TEXTS,
      ocr_tokens=parts.TEXTS,
      image=parts.IMAGE,
    ),
  ),
  "VQAv2": (
    "validation",
    _vqav2,
    _types(
      "question_type multiple_choice_answer answer_type question",
      answers=[
        _types("answer answer_confidence", answer_id=parts.INT),
      ],
      image_id=parts.INT,
      question_id=parts.INT,
      image=parts.IMAGE,
    ),
  ),
  "DocVQA": (
    "validation",
    _docvqa,
    _types(
      "questionId question data_split",
      question_types=parts.TEXTS,
      docId=parts.INT,
      answers=parts.TEXTS,
      image=parts.IMAGE,
    ),
  ),
  "SEED-Bench": (
    "test",
    _seed_bench,
    _types(
      "answer choice_a choice_b choice_c choice_d data_type question"
      " question_id",
      image=[parts.IMAGE],
    ),
  ),
  "MMMU": (
    "validation",
    _mmmu,
    _types(
      "id question options answer question_type",
      **{f"image_{k}": parts.IMAGE for k in range(1, 8)},
    ),
  ),
}
