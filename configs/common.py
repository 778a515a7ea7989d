"""Common to all recipes: how a stage is written down, and its defaults.

Every number of a run stands in a config file: here, or in the recipe that
overrides it.
"""

import ml_collections

ConfigDict = ml_collections.ConfigDict

# Rows over max_length are an "error", or "drop" (counted), or "truncate_answer";
# "auto" drops them from published mixtures and MMPR alone.
_TEXT = dict(template="qwen_1_5", mask="paper", max_length=2048, long="auto")

_DEFAULTS = dict(
  # paper 2.1 and 2.2: AdamW, cosine to 0, 3 % warmup, clip 1.0, no decay; SFT
  # losses are token means per pair of examples (2.4).
  train=dict(
    objective="sft",
    parts=("vision", "projector", "llm"),
    trainable=(".*",),
    data="",
    batch=32,
    steps=100,
    lr=((".*", 1e-3),),
    weight_decay=((".*", 0.0),),
    schedule="cosine",
    warmup=0.03,
    clip=1.0,
    accum=1,
    moments="float32",
    beta=0.1,
    sft_group=2,
    chunk=4096,
    save_every=100,
    pack=dict(tokens=0, losses=0, images=1, row=0, row_images=0),
    # Threads that read and decode ahead; -1: one for each core, 16 at most.
    workers=-1,
    **_TEXT,
  ),
  score=dict(
    data="", batch=64, chunk=4096, workers=-1, pack=dict(row=0), **_TEXT
  ),
  detach=dict(),
  # `blind` names rows to fit the question-only baseline on; empty: none.
  # Asked in ChatML, whatever the model was trained on. Measures "vqa" of a
  # re-assembled MLLM or "mllm" of one that an encoder is cut out of.
  evaluate=dict(
    data="",
    blind="",
    batch=100,
    max_new_tokens=16,
    max_length=2048,
    arm="",
    measure="vqa",
  ),
  # paper 5.1: no standardisation, lambda chosen on a validation share of train.
  linear_probe=dict(
    data=(("classify_train", 1.0), ("classify_test", 1.0)),
    batch=100,
    lambdas=(1e-6, 1e6, 25),
    validation=0.2,
    tolerance=1e-7,
    max_iterations=1000,
    arm="",
    measure="linear",
  ),
  # paper 5.2; "none" or -1 stands for none.
  segment_probe=dict(
    data=(("segment_train", 1.0), ("segment_test", 1.0)),
    batch=32,
    epochs=5,
    hidden=1024,
    lr=1e-3,
    lr_min=1e-4,
    warmup=500,
    weight_decay=0.01,
    num_classes=151,
    background="0",
    ignore=-1,
    resamples=200,
    examples=6,
    arm="",
    measure="segment",
  ),
  gradcam=dict(
    data="",
    batch=24,
    beta=0.1,
    chunk=4096,
    examples=6,
    arm="",
    measure="gradient",
    **_TEXT,
  ),
  # `lead` opens the page; empty, it is what the numbers say of the first pair
  # of `c.compared`, followed by `caution`.
  report=dict(title="PIVOT", lead="", caution=""),
)


def stage(kind: str, *, inputs: dict | None = None, **fields) -> ConfigDict:
  """Return one stage: its kind, where its inputs come from, its numbers.

  Args:
    kind: the file in pivot_jax/stages that runs it, or your own, as
      "my.module:function" or "my/file.py:function".
    inputs: "@stage", "@stage:subtree" or an address, by the name the stage
      gives it (init, vision, projector, llm, reference).
    **fields: what differs from the defaults of the kind.
  """
  own = ":" in kind
  if not own and kind not in _DEFAULTS:
    raise ValueError(
      f"stage({kind!r}): choose one of {', '.join(_DEFAULTS)}, or name your own "
      'as "my.module:function" or "my/file.py:function"'
    )
  defaults = dict(data="", arm="", measure="") if own else _DEFAULTS[kind]
  known = {*defaults, *("only_if_used", "shipped", "seed", "data_seed", "llm")}
  unknown = set(fields) - known
  if unknown and not own:
    raise ValueError(f"{kind} has no fields {sorted(unknown)}")
  section = dict(kind=kind, seed=0, data_seed=0) | defaults | fields
  if "pack" in fields:
    section["pack"] = defaults.get("pack", {}) | fields["pack"]
  config = ConfigDict(section)
  config.inputs = ConfigDict(inputs or {})
  return config


def arm(name: str, *, model: str, label: str, short: str = "") -> dict:
  """Return an arm of the experiment, a model whose encoder is measured.

  Stages measure it whose field `arm` is its name.

  Args:
    name: the arm, as stages and results name it.
    model: the stage that makes it, or the address of a model.
    label: what the report's tables call it.
    short: its name in differences and charts; the label if empty.
  """
  return dict(name=name, model=model, label=label, short=short or label)


def pair(one: str, other: str, *, same_rows: bool = False) -> dict:
  """Return two arms whose difference, one - other, the report gives.

  `same_rows`: both have to be trained on the same rows, in the same order and
  from the same weights; a run where they are not ends in an error.
  """
  return dict(one=one, other=other, same_rows=same_rows)


def scenes() -> ConfigDict:
  """Return the embedded data by name; `split` keeps them apart."""

  def source(task, split, size, **fields):
    return dict(kind="scenes", task=task, split=split, size=size, **fields)

  return ConfigDict(
    dict(
      text=source("text", "train", 100_000, turns=5),
      pretrain=source("caption", "pretrain", 100_000),
      caption=source("caption", "train", 20_000),
      chat=source("chat", "train", 100_000, turns=4),
      preference=source("preference", "train", 2_000),
      validation=source("eval", "val", 1_200),
      eval=source("eval", "test", 1_200),
      blind=source("eval", "train", 5_000),
      classify_train=source("classify", "probe_train", 2_000),
      classify_test=source("classify", "probe_test", 2_000),
      segment_train=source("segment", "probe_train", 1_000),
      segment_test=source("segment", "probe_test", 500),
      gradcam=source("preference", "gradcam", 240),
    )
  )


def given_sources(given: ConfigDict) -> dict:
  """Return the sources of given files, by the names that the stages use."""

  def source(kind, name, **fields):
    return dict(
      kind=kind,
      path=given.get_ref(name),
      given_by=f"set --config.files.{name}",
      max_bad=given.get_ref("max_bad"),
      **fields,
    )

  images = dict(image_root=given.get_ref("images"))
  decoder = dict(decoder=given.get_ref("decoder"))
  rows = images | decoder | dict(bad=given.get_ref("bad"))
  return dict(
    text=source("llava_text", "pretrain", **rows),
    **{
      name: source("llava", "pretrain", **rows)
      for name in ("pretrain", "caption", "chat")
    },
    preference=source(
      "preference", "preference", group=given.get_ref("group"), **rows
    ),
    eval=source("eval", "eval", **images),
    classify_train=source("classify", "classify", split="train"),
    classify_test=source("classify", "classify", split="val"),
    segment_train=source("segment", "segment", split="train"),
    segment_test=source("segment", "segment", split="val"),
    gradcam=dict(kind="none", path="", given_by="needs masks of objects"),
  )
