"""Writes NLVR preference rows with 1 to 4 pairs on each image and question.

  python -m tests.pair_nlvr --data=DIR --to=FILE.jsonl

reads `nlvr/train_mmpr.jsonl` in the folder of test data. Row i gets 1 + i % 4
pairs that say true and false in as many ways, for a trial of
`--config.files.group`.
"""

import argparse
import json
import pathlib

WAYS = ("{}.", "It is {}.", "The statement is {}.", "I would say {}.")


def pairs(record: dict, count: int) -> list[dict]:
  """Return a record as `count` pairs, ids ID-0, ID-1, ..."""
  words = [record[side].strip(".").lower() for side in ("chosen", "rejected")]
  found = []
  for number, way in enumerate(WAYS[:count]):
    chosen, rejected = (
      text[0].upper() + text[1:] for text in map(way.format, words)
    )
    found.append(
      record
      | dict(id=f"{record['id']}-{number}", chosen=chosen, rejected=rejected)
    )
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--data", type=pathlib.Path, required=True)
  parser.add_argument("--to", type=pathlib.Path, required=True)
  args = parser.parse_args()
  text = (args.data / "nlvr" / "train_mmpr.jsonl").read_text("utf-8")
  records = [json.loads(line) for line in text.splitlines()]
  rows = [
    row
    for index, record in enumerate(records)
    for row in pairs(record, 1 + index % 4)
  ]
  args.to.write_text(
    "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
  )


if __name__ == "__main__":
  main()
