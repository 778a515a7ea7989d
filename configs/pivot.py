"""The paper's whole experiment at toy scale, on embedded data or your own.

  python -m pivot_jax.main --config=configs/pivot.py --workdir=runs/pivot

  configs/pivot.py               from shipped weights, 15 min on 2 cores
  configs/pivot.py:debug         the same stages, tiny: does it run?
  configs/pivot.py:from_scratch  makes the shipped weights again, too
  configs/pivot.py:sweep         learning rates of SFT and DPO on a split that
                                 the report never uses
  configs/pivot.py:files         your own files: --config.files.pretrain=... etc.

Arms: `original` (the encoder as it came), `stage1` (no post-training), `sft`,
`dpo` (PIVOT). Override anything with --config.path.to.key=value;
--config.new_fraction=0.5 has half of the preference pairs think aloud.
"""

from configs import common

stage = common.stage
ConfigDict = common.ConfigDict

ARMS = ("original", "stage1", "sft", "dpo")
# The MLLM that each arm's encoder is cut out of. The projector stage leaves the
# encoder as it came, so it is where `original` gets its projector from.
MLLM = dict(
  original="stage1_proj",
  stage1="stage1_full",
  sft="stage2_sft",
  dpo="stage2_dpo",
)
SWEEP = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


def get_config(name: str = "") -> ConfigDict:
  """Return the recipe of a name: "", debug, from_scratch, sweep or files."""
  kinds = {
    "": lambda c: c,
    "debug": debug,
    "from_scratch": from_scratch,
    "sweep": sweep,
    "files": files,
  }
  if name not in kinds:
    raise ValueError(f"configs/pivot.py:{name}: choose one of {sorted(kinds)}")
  return kinds[name](toy())


def toy() -> ConfigDict:
  """Return the default recipe."""
  c = ConfigDict()
  c.seeds = 1
  c.tensorboard = False
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.compute = dict(dtype="float32", remat="none", scan=False, attention="auto")
  # "10:13" writes a profile of these updates of each training stage.
  c.profile = ""
  # How images are brought to the encoder's size, in training and measuring.
  c.resample = "bicubic"
  # The share of preference rows whose answers are of a kind that stage 1 never
  # showed, longer and with `<think> ... </think>` (paper 4.6); 0 to 1.
  c.new_fraction = 0.0
  c.tokenizer = "package:toy"
  # `init` is an address: package:toy:vision, hf:DIR, DIR:vision, @stage:vision.
  # The sizes are those of a model that starts at random.
  c.vision = dict(
    init="package:toy:vision",
    image_size=48,
    patch_size=8,
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=5,
    num_attention_heads=4,
  )
  c.llm = dict(
    init="package:toy:llm",
    vocab_size=0,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    initializer_range=0.1,
  )
  c.sources = common.scenes()
  c.sources.preference.new_fraction = c.get_ref("new_fraction")
  stage0(c)
  stage1(c)
  stage2(c)
  for arm in ARMS:
    probes(c, arm)
    reassembly(c, arm)
  evaluations(c)
  c.report = stage("report")
  c.order = order()
  # What runs once, however many seeds; everything else is repeated for each.
  c.shared = (
    "stage0_llm",
    "stage0_vision",
    "stage1_proj",
    "stage1_full",
    "reference",
  )
  return c


def order() -> tuple[str, ...]:
  """Return the stages in the order they run, the arms side by side."""

  def each(prefix, arms=ARMS):
    return tuple(f"{prefix}_{arm}" for arm in arms)

  return (
    "stage0_llm",
    "stage0_vision",
    "stage1_proj",
    "stage1_full",
    "reference",
    "stage2_sft",
    "stage2_dpo",
    *each("detach"),
    *each("linear_probe"),
    *each("segment_probe"),
    *each("gradcam"),
    *each("evaluate", ("stage1", "sft", "dpo")),
    *each("pivot_proj"),
    *each("pivot_full"),
    *each("evaluate_pivot"),
    "report",
  )


def stage0(c: ConfigDict) -> None:
  """Stand in for published weights: an LLM of text, an encoder of captions."""
  c.stage0_llm = stage(
    "train",
    only_if_used=True,
    parts=("llm",),
    data="text",
    trainable=("llm/.*",),
    batch=32,
    steps=1800,
    lr=((".*", 2e-3),),
    pack=dict(row=256),
  )
  # The captioner's language model is thrown away: smaller, of another seed.
  throwaway = c.llm.to_dict() | dict(num_hidden_layers=2)
  c.stage0_vision = stage(
    "train",
    only_if_used=True,
    seed=7,
    llm=throwaway,
    data="pretrain",
    template="plain",
    trainable=(".*",),
    batch=32,
    steps=4000,
    lr=((".*", 2e-3),),
    pack=dict(tokens=112, losses=72),
  )


def stage1(c: ConfigDict) -> None:
  """Attach the encoder to the LLM: projector alone, then everything."""
  c.stage1_proj = stage(
    "train",
    inputs=dict(vision=c.vision.get_ref("init"), llm=c.llm.get_ref("init")),
    data="caption",
    trainable=("projector/.*",),
    batch=32,
    steps=80,
    lr=((".*", 5e-3),),
    pack=dict(row=320),
  )
  # The encoder learns at a lower rate than the rest, as in the paper (2.1).
  # Its result ships with the package and is taken if nothing here is changed.
  c.stage1_full = stage(
    "train",
    inputs=dict(init="@stage1_proj"),
    shipped="package:toy/stage1",
    data=(("chat", 7.0), ("text", 1.0)),
    trainable=(".*",),
    batch=32,
    steps=1600,
    lr=(("vision/.*", 5e-4), (".*", 1e-3)),
    pack=dict(row=256),
  )


def stage2(c: ConfigDict) -> None:
  """Post-trains one checkpoint twice, on the same rows in the same order."""
  c.reference = stage(
    "score", inputs=dict(init="@stage1_full"), data="preference"
  )
  # Both by the one rule of docs/sweep.md.
  c.stage2_sft = post_training(c, objective="sft", lr=((".*", 3e-4),))
  c.stage2_dpo = post_training(c, objective="dpo", lr=((".*", 3e-4),))


def post_training(c: ConfigDict, *, objective: str, lr) -> ConfigDict:
  """Return one arm of stage 2; the arms differ in objective and rate alone."""
  # The row lengths that leave the least padding; they change no number. A pair
  # that thinks aloud takes up to 322 tokens; -(-x // 1) rounds up.
  thinking = -(-c.get_ref("new_fraction") // 1)
  row = (224 + 224 * thinking).to_int() if objective == "dpo" else 512
  inputs = dict(init="@stage1_full")
  if objective == "dpo":
    inputs["reference"] = "@reference"
  return stage(
    "train",
    inputs=inputs,
    objective=objective,
    data="preference",
    trainable=(".*",),
    batch=64,
    steps=93,
    lr=lr,
    pack=dict(row=row),
  )


def probes(c: ConfigDict, arm: str) -> None:
  """Cut one arm's encoder out and measure it."""
  c[f"detach_{arm}"] = stage("detach", inputs=dict(init=f"@{MLLM[arm]}"))
  inputs = dict(init=f"@detach_{arm}")
  c[f"linear_probe_{arm}"] = stage("linear_probe", inputs=inputs)
  # 31 updates an epoch: more epochs and a shorter warmup than the paper's.
  c[f"segment_probe_{arm}"] = stage(
    "segment_probe",
    inputs=inputs,
    num_classes=11,
    epochs=20,
    hidden=256,
    warmup=60,
  )
  c[f"gradcam_{arm}"] = stage(
    "gradcam", inputs=dict(init=f"@{MLLM[arm]}"), data="gradcam"
  )


def reassembly(c: ConfigDict, arm: str) -> None:
  """Build a new MLLM around the frozen encoder: fresh projector, fresh LLM."""
  c[f"pivot_proj_{arm}"] = c.stage1_proj.copy_and_resolve_references()
  c[f"pivot_proj_{arm}"].inputs = dict(
    vision=f"@detach_{arm}:vision", llm=c.llm.get_ref("init")
  )
  c[f"pivot_proj_{arm}"].seed = 1
  c[f"pivot_full_{arm}"] = c.stage1_full.copy_and_resolve_references()
  c[f"pivot_full_{arm}"].update(
    dict(
      inputs=dict(init=f"@pivot_proj_{arm}"),
      trainable=("projector/.*", "llm/.*"),
      lr=((".*", 1e-3),),
      seed=1,
      steps=300,
      shipped="",
      pack=dict(row=320),
    )
  )


def evaluations(c: ConfigDict) -> None:
  """Ask the test questions of every MLLM, by generation."""
  models = {f"evaluate_{arm}": MLLM[arm] for arm in ARMS[1:]}
  models |= {f"evaluate_pivot_{arm}": f"pivot_full_{arm}" for arm in ARMS}
  for name, model in models.items():
    c[name] = stage(
      "evaluate", inputs=dict(init=f"@{model}"), data="eval", blind="blind"
    )


def from_scratch(c: ConfigDict) -> ConfigDict:
  """Make the stage-0 weights instead of taking the shipped ones."""
  c.vision.init = "@stage0_vision:vision"
  c.llm.init = "@stage0_llm:llm"
  return c


def debug(c: ConfigDict) -> ConfigDict:
  """Keep every stage and make it tiny: two cores, three minutes, cold."""
  c.report.title = "PIVOT, debug run"
  c.report.lead = (
    "Four updates a stage: this page shows that everything runs, and says nothing "
    "about the methods."
  )
  for name in c.order:
    section = c[name]
    if section.kind == "train":
      section.batch, section.steps, section.save_every = 8, 4, 2
  for name, size in (
    ("preference", 32),
    ("eval", 48),
    ("classify_train", 200),
    ("classify_test", 100),
    ("segment_train", 64),
    ("segment_test", 32),
    ("gradcam", 200),
  ):
    c.sources[name].size = size
  return c


def sweep(c: ConfigDict) -> ConfigDict:
  """Try the same rates for both objectives, scored on the validation split."""
  names = []
  for objective in ("sft", "dpo"):
    for rate in SWEEP:
      name = f"{objective}_{rate:.0e}".replace("-", "m")
      c[f"stage2_{name}"] = post_training(
        c, objective=objective, lr=((".*", rate),)
      )
      c[f"evaluate_{name}"] = stage(
        "evaluate", inputs=dict(init=f"@stage2_{name}"), data="validation"
      )
      names += [f"stage2_{name}", f"evaluate_{name}"]
  c.evaluate_start = stage(
    "evaluate", inputs=dict(init="@stage1_full"), data="validation"
  )
  c.order = (
    "stage0_llm",
    "stage0_vision",
    "stage1_proj",
    "stage1_full",
    "reference",
    "evaluate_start",
    *names,
  )
  return c


def files(c: ConfigDict) -> ConfigDict:
  """Run the loop on your own files; stages without data are skipped.

  files.pretrain  LLaVA records (.json or .jsonl), for stage 1 and re-assembly
  files.preference  MMPR rows (.jsonl): image, question, chosen, rejected
  files.eval  records of question and answer (and category), or LLaVA records
  of one question and its answer
  files.images  the folder that image paths are relative to
  files.classify  DIR/{train,val}/CLASS/*; files.segment
  DIR/{train,val}/{images,labels}, with segment_ignore (-1: none) and
  segment_background ("none", or the index of the background class)
  files.max_bad  the share of rows of a file that may be skipped, and is named,
  because a field or the image cannot be read; 0: the first one is an error
  files.bad  the bad.jsonl of `python -m pivot_jax.data check`: rows to skip
  files.long  rows over max_length: error, drop, truncate_answer, or auto
  files.group  trains pairs that share image and question as one example
  files.decoder  pil, or pil_draft: faster, other pixels (docs/data.md)
  """
  c.files = dict(
    pretrain="",
    preference="",
    eval="",
    images="",
    classify="",
    segment="",
    segment_ignore=-1,
    segment_background="none",
    max_bad=0.0,
    bad="",
    long="auto",
    group=False,
    decoder="pil",
  )

  c.sources = common.given_sources(c.files)
  # Given rows are what they are: setting it is an error, and not in vain.
  del c.new_fraction
  c.report.title = "PIVOT on given files"
  c.report.lead = (
    "This page makes no claim: compare accuracies with the majority answer, and "
    "mind how many updates and rows they come from."
  )
  # Conversations of any number of turns, rows as long as the longest example.
  for name in c.order:
    section = c[name]
    if section.kind == "train":
      section.template = "qwen_1_5"
      section.steps, section.batch = 40, 16
      section.pack.update(dict(tokens=0, losses=0, row=0))
      if name != "stage0_llm" and not isinstance(section.data, str):
        section.data = (("chat", 1.0),)
    if section.kind in ("train", "score"):
      section.long = c.files.get_ref("long")
    if section.kind == "evaluate":
      section.blind = ""
    if section.kind == "segment_probe":
      section.num_classes = 0
      section.ignore = c.files.get_ref("segment_ignore")
      section.background = c.files.get_ref("segment_background")
  return c
