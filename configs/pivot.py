"""The paper's whole experiment at toy scale, on embedded data or your own.

  python -m pivot_jax.main --config=configs/pivot.py --workdir=runs/pivot

  configs/pivot.py               from shipped weights, 7 min on 2 cores
  configs/pivot.py:debug         the same stages, tiny: does it run?
  configs/pivot.py:from_scratch  makes the shipped weights again, too
  configs/pivot.py:sweep         learning rates of SFT and DPO on a split that
                                 the report never uses
  configs/pivot.py:files         your own files: --config.files.pretrain=... etc.

Arms: `original` (the encoder as it came), `stage1` (no post-training), `sft`,
`dpo` (PIVOT). Override anything with --config.path.to.key=value;
--config.new_fraction=0.5 has half of the preference pairs think aloud.
"""

from pivot_jax.configs import common

stage = common.stage
ConfigDict = common.ConfigDict

# The projector stage leaves the encoder as it came, so it is where `original`
# gets its projector from.
ARMS = (
  common.arm(
    "original",
    model="stage1_proj",
    label="original encoder",
    short="original",
  ),
  common.arm(
    "stage1", model="stage1_full", label="stage 1 only", short="stage 1"
  ),
  common.arm("sft", model="stage2_sft", label="SFT"),
  common.arm("dpo", model="stage2_dpo", label="DPO (PIVOT)", short="DPO"),
)
# The first pair is the headline.
COMPARED = (
  common.pair("dpo", "sft", same_rows=True),
  common.pair("dpo", "original"),
  common.pair("dpo", "stage1"),
  common.pair("sft", "stage1"),
)
CAUTION = (
  "This is an experiment at toy scale: it demonstrates the pipeline and can "
  "neither confirm nor refute the paper."
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
    known = ", ".join(sorted(kinds)[1:])
    raise ValueError(f"no variant {name!r}: choose one of {known}, or none")
  return kinds[name](toy())


def toy() -> ConfigDict:
  """Return the default recipe."""
  c = ConfigDict()
  c.seeds = 1
  c.tensorboard = False
  # Beside metrics.jsonl: names of pivot_jax.metrics.WRITERS, or your own, as
  # "my.module:writer" or "my/file.py:writer".
  c.writers = ()
  c.mesh = dict(data=-1, fsdp=1, tensor=1)
  c.compute = dict(dtype="float32", remat="none", scan=False, attention="auto")
  # "cpu", "cuda" or "tpu"; "" takes what jax finds, and an accelerator that is
  # there and not used is an error.
  c.platform = ""
  # Seconds without any progress after which a run of several processes ends, so
  # that it is started again; 0: never.
  c.watchdog = 600
  # Checkpoints of every so many updates stay for ever; 0: the last two alone.
  c.keep_every = 0
  # GB of a checkpoint that a host holds on their way to disk and from it; 0 to
  # disk: a quarter of its memory. More than that is written leaf by leaf, and the
  # training waits.
  c.save_concurrent_gb, c.restore_concurrent_gb = 0.0, 2.0
  # "10:13" writes a profile of these updates of each training stage.
  c.profile = ""
  # How images are brought to the encoder's size, in training and measuring.
  c.resample = "bicubic"
  # The share of preference rows whose answers are of a kind that stage 1 never
  # showed, longer and with `<think> ... </think>` (paper 4.6); 0 to 1.
  c.new_fraction = 0.0
  c.tokenizer = "package:toy"
  parts(c)
  c.sources = common.scenes()
  c.sources.preference.new_fraction = c.get_ref("new_fraction")
  stage0(c)
  stage1(c)
  stage2(c)
  c.arms, c.compared = ARMS, COMPARED
  for arm in ARMS:
    probes(c, arm)
    reassembly(c, arm)
  evaluations(c)
  c.report = stage("report", title="PIVOT at toy scale", caution=CAUTION)
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


def parts(c: ConfigDict) -> None:
  """Set the encoder and the LLM: where they come from, or their sizes."""
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


def order() -> tuple[str, ...]:
  """Return the stages in the order they run, the arms side by side."""
  names = tuple(arm["name"] for arm in ARMS)

  def each(prefix, names=names):
    return tuple(f"{prefix}_{name}" for name in names)

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
    *each("evaluate", names[1:]),
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


def post_training(
  c: ConfigDict, *, objective: str, lr, pairs: bool | None = None
) -> ConfigDict:
  """Return one arm of stage 2; the arms differ in objective and rate alone.

  `pairs`: whether the objective learns from both answers and from the
  reference, as dpo does.
  """
  pairs = objective == "dpo" if pairs is None else pairs
  # The row lengths that leave the least padding; they change no number. A pair
  # that thinks aloud takes up to 322 tokens; -(-x // 1) rounds up.
  thinking = -(-c.get_ref("new_fraction") // 1)
  row = (224 + 224 * thinking).to_int() if pairs else 512
  inputs = dict(init="@stage1_full")
  if pairs:
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


def probes(c: ConfigDict, arm: dict) -> None:
  """Cut one arm's encoder out and measure it."""
  name, whole = arm["name"], dict(init=model(c, arm))
  c[f"detach_{name}"] = stage("detach", inputs=whole)
  inputs = dict(init=f"@detach_{name}")
  c[f"linear_probe_{name}"] = stage("linear_probe", inputs=inputs, arm=name)
  # 31 updates an epoch: more epochs and a shorter warmup than the paper's.
  c[f"segment_probe_{name}"] = stage(
    "segment_probe",
    inputs=inputs,
    arm=name,
    num_classes=11,
    epochs=20,
    hidden=256,
    warmup=60,
  )
  c[f"gradcam_{name}"] = stage(
    "gradcam", inputs=whole, data="gradcam", arm=name
  )


def model(c: ConfigDict, arm: dict) -> str:
  """Return where an arm's MLLM is: the edge to its stage, or its address."""
  return f"@{arm['model']}" if arm["model"] in c else arm["model"]


def reassembly(c: ConfigDict, arm: dict) -> None:
  """Build a new MLLM around the frozen encoder: fresh projector, fresh LLM."""
  name = arm["name"]
  c[f"pivot_proj_{name}"] = c.stage1_proj.copy_and_resolve_references()
  c[f"pivot_proj_{name}"].inputs = dict(
    vision=f"@detach_{name}:vision", llm=c.llm.get_ref("init")
  )
  c[f"pivot_proj_{name}"].seed = 1
  c[f"pivot_full_{name}"] = c.stage1_full.copy_and_resolve_references()
  c[f"pivot_full_{name}"].update(
    dict(
      inputs=dict(init=f"@pivot_proj_{name}"),
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
  for arm in ARMS:
    name, asked = arm["name"], dict(data="eval", blind="blind")
    if arm != ARMS[0]:
      c[f"evaluate_{name}"] = stage(
        "evaluate",
        inputs=dict(init=model(c, arm)),
        arm=name,
        measure="mllm",
        **asked,
      )
    c[f"evaluate_pivot_{name}"] = stage(
      "evaluate", inputs=dict(init=f"@pivot_full_{name}"), arm=name, **asked
    )


def add_arm(c: ConfigDict, arm: dict) -> None:
  """Measure one more arm, whose model is a stage of `c` or an address.

  It is compared with the first of `c.arms`, and is not re-assembled.
  """
  name = arm["name"]
  c.arms = (*c.arms, arm)
  c.compared = (*c.compared, common.pair(name, c.arms[0]["name"]))
  probes(c, arm)
  c[f"evaluate_{name}"] = stage(
    "evaluate",
    inputs=dict(init=model(c, arm)),
    data="eval",
    blind="blind",
    arm=name,
    measure="mllm",
  )
  kinds = ("detach", "linear_probe", "segment_probe", "gradcam", "evaluate")
  made = [x for x in (arm["model"],) if x in c and x not in c.order]
  new = (*made, *(f"{kind}_{name}" for kind in kinds))
  reports = tuple(x for x in c.order if c[x].kind == "report")
  c.order = (*(x for x in c.order if x not in reports), *new, *reports)


def from_scratch(c: ConfigDict) -> ConfigDict:
  """Make the stage-0 weights instead of taking the shipped ones."""
  c.vision.init = "@stage0_vision:vision"
  c.llm.init = "@stage0_llm:llm"
  return c


def debug(c: ConfigDict) -> ConfigDict:
  """Keep every stage and make it tiny: one to two minutes on two cores."""
  c.report.title = "PIVOT, debug run"
  c.report.caution = ""
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
