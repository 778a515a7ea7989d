"""VQA by greedy generation: exact match per category, with predictions kept.

  c.evaluate_dpo = stage("evaluate", inputs=dict(init="@pivot_full_dpo"), ...)

An answer counts if it equals the reference after lower-casing, collapsing
spaces, dropping a final full stop and composing characters (NFC). Every
prediction is written to `predictions.jsonl`, so that two models can be compared
item by item.
"""

import collections
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pivot_jax import files, metrics, processes, sharding, texts
from pivot_jax.data import coders, feed, opener
from pivot_jax.errors import InputError
from pivot_jax.evals import generate, question_only
from pivot_jax.models import layers
from pivot_jax.training import loop
from pivot_jax.weights import checkpoint

# Parts that the model must have; looked for before anything runs.
NEEDS = (*checkpoint.PARTS, "tokenizer")

_generate = jax.jit(
  generate.generate,
  static_argnums=0,
  static_argnames=("max_new_tokens", "eos_ids"),
)


def run(
  config: ConfigDict, inputs: Mapping[str, str], out: pathlib.Path
) -> dict[str, Any]:
  """Answers every question; returns accuracies per category and overall."""
  compute = layers.Compute(**config.compute.to_dict())
  model = checkpoint.load_model(inputs["init"], needs=NEEDS, compute=compute)
  source = opener.open_source(config.sources[config.data].to_dict())
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh), layers.logical_rules(sharding.ACTIVATION_RULES):
    answers = _answers(config, model, source, mesh)
  own = [[index, _record(source, index, said)] for index, said in answers]
  told = processes.exchange("answers", own)
  everyone = {index: one for part in told for index, one in part}
  records = [everyone[index] for index in range(len(source))]
  if processes.first():
    files.make_folder(out)
    text = "".join(json.dumps(record) + "\n" for record in records)
    files.write_text(out / "predictions.jsonl", text)
  return summarize(records) | _blind(config, records)


def _record(source, index: int, said: str) -> dict[str, Any]:
  row = source.text(index)
  return {
    "id": row["id"],
    "category": row["category"],
    "kind": row["kind"],
    "question": row["question"],
    "answer": row["answer"],
    "said": said,
    "correct": normalize(said) == normalize(row["answer"]),
  }


def normalize(answer: str) -> str:
  """Return an answer in the form that is compared."""
  words = " ".join(texts.canonical(answer).lower().split())
  # Lower case of a composed character may be two that compose again.
  return texts.canonical(words.removesuffix(".").rstrip())


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Return shares with n and SE: "category/…", "kind/…", "all" (a mean).

  "all" is the mean of the categories, as the paper averages (6.1); "majority/…"
  is the share of a category's most frequent answer, which needs no image.
  """
  found: dict[str, Any] = {}
  for field in ("category", "kind"):
    groups = collections.defaultdict(list)
    for record in records:
      groups[texts.canonical(record[field])].append(record["correct"])
    for name in sorted(groups):
      hits = groups[name]
      found[f"{field}/{name}"] = metrics.share(sum(hits), len(hits))
  categories = [v for k, v in found.items() if k.startswith("category/")]
  errors = [c["se"] for c in categories]
  found["all"] = metrics.measured(
    np.mean([c["value"] for c in categories]),
    len(records),
    float(np.sqrt(np.sum(np.square(errors))) / len(categories)),
  )
  answers = collections.defaultdict(collections.Counter)
  for record in records:
    name = texts.canonical(record["category"])
    answers[name][normalize(record["answer"])] += 1
  for name in sorted(answers):
    most = answers[name].most_common(1)[0][1]
    found[f"majority/{name}"] = metrics.share(most, answers[name].total())
  return found


def _check_rows(source, indices: Sequence[int], tokenizer, config) -> None:
  """Raise if a row cannot be scored, before anything is generated."""
  for index in indices:
    processes.beat("reading row", index)
    row = source.text(index)
    for name in ("question", "answer", "category", "kind"):
      if name not in row:
        raise InputError(
          f"{source.name(index)}: {name!r}: the row has no such field; evaluate "
          "needs questions with one answer each"
        )
    answer = str(row["answer"])
    forms = (answer, normalize(answer))
    needed = min(len(tokenizer.encode(form)) for form in forms)
    if needed > config.max_new_tokens:
      raise InputError(
        f"{source.name(index)}: the answer takes {needed} tokens, over "
        f"max_new_tokens={config.max_new_tokens}: raise it"
      )


def _blind(config, records) -> dict[str, Any]:
  """Return what the question alone answers: "blind/category/…", "blind/kind/…".

  The most frequent answer to each question, learnt from the rows that
  `config.blind` names; nothing without it.
  """
  if not config.blind:
    return {}
  source = opener.open_source(config.sources[config.blind].to_dict())
  baseline = question_only.fit(source.text(i) for i in range(len(source)))
  return {
    f"blind/{by}/{name}": metrics.share(right, asked)
    for by in ("category", "kind")
    for name, (right, asked) in question_only.accuracy(
      baseline, records, by=by
    ).items()
  }


def _answers(config, model, source, mesh) -> list[tuple[int, str]]:
  """Return what the model says to the rows of this process's share, by row."""
  tokenizer, patches = model.tokenizer, model.mllm.vision.num_patches
  template = model.meta.get("template", "qwen_1_5")
  coder = coders.coder_of(
    config.to_dict() | {"template": template},
    tokenizer,
    image_size=model.mllm.vision.image_size,
  )
  share, shards = feed.Share.of(mesh), sharding.row_shards(mesh)
  batch = -(-config.batch // shards) * shards
  # A last batch that is not full repeats the last row.
  shares = [
    [start + place for place in share.of_batch(batch, batch)]
    for start in range(0, len(source), batch)
  ]
  rows = [index for one in shares for index in one if index < len(source)]
  _check_rows(source, rows, tokenizer, config)
  tokens = feed.longest_prompt(source, coder, patches, rows)
  if tokens > config.max_length:
    raise InputError(
      f"{config.name}: the longest prompt has {tokens} tokens with its image, "
      f"over max_length={config.max_length}: shorten it or raise the limit"
    )
  tokens = -(-tokens // 16) * 16
  params = sharding.place(model.params, mesh)
  status = metrics.Status(config.name, len(source))
  answers: list[tuple[int, str]] = []
  for done, own in enumerate(shares, 1):
    processes.beat("reading rows of batch", done)
    indices = [min(index, len(source) - 1) for index in own]
    packed = feed.prompts(
      source, indices, coder, tokens=tokens, patches=patches
    )
    slow = processes.SLOW if done == 1 else 0.0
    processes.beat("answering batch", done, allow=slow)
    ids = _generate(
      model.mllm,
      params,
      sharding.place_rows(packed, mesh),
      max_new_tokens=config.max_new_tokens,
      eos_ids=tokenizer.eos_ids,
    )
    said = _decode(tokenizer, sharding.own_rows(ids, mesh))
    answers += [x for x in zip(own, said) if x[0] < len(source)]
    status.show(min(done * batch, len(source)))
    loop.stop_if_requested(config.name)
  return answers


def _decode(tokenizer, ids) -> list[str]:
  """Return the text of each row up to its first stop token."""
  found = []
  for row in np.asarray(ids):
    stops = np.flatnonzero(np.isin(row, tokenizer.eos_ids))
    found.append(tokenizer.decode(row[: stops[0]] if len(stops) else row))
  return found
