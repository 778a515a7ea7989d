"""Hand an encoder, a language model or an MLLM to other tools.

  python -m pivot_jax.export --from=runs/pivot/detach_dpo --to=out --format=hf

--from is any address (an artifact, hf:DIR, bv:FILE.npz, timm:FILE). Formats:
hf (the encoder as transformers' class of its family, a language model as
Qwen2ForCausalLM), llava (LlavaForConditionalGeneration with all its files),
timm, big_vision. It runs on a CPU, from the artifact alone; the folder is
written aside and renamed, so that it is whole or not there.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import app, flags

from pivot_jax import addresses, command_line, files, output
from pivot_jax.errors import InputError

if TYPE_CHECKING:
  from pivot_jax.models import qwen2, vit

FORMATS = ("hf", "llava", "timm", "big_vision")
# The parts that each format holds; hf holds a language model if there is no
# encoder.
_PARTS = {
  "hf": ("vision",),
  "llava": ("vision", "projector", "llm"),
  "timm": ("vision",),
  "big_vision": ("vision",),
}
DTYPES = ("float32", "bfloat16", "float16")
_CHOICES = {"format": FORMATS, "dtype": DTYPES}
_FLAGS = {
  "from": "The address of the weights.",
  "to": "The folder to write; must not be there.",
  "format": "The format to write.",
  "dtype": "Of the weights.",
  "source": "Where the weights that were not trained lie now.",
}


@dataclasses.dataclass(frozen=True)
class Job:
  """The contents of a folder to write.

  `unread` is the rest of the tower, which is not trained.
  """

  params: Any
  meta: Mapping[str, Any]
  unread: Mapping[str, Any] | None
  tokenizer: Any
  dtype: str
  name: str
  folder: pathlib.Path | None = None


def export(
  address: str,
  to: str | os.PathLike,
  *,
  format: str,
  dtype: str = "float32",
  source: str | None = None,
) -> pathlib.Path:
  """Write the weights at an address in another format; return the folder.

  Raises:
    InputError: the folder is there, the address does not hold what the format
      needs, or what was not trained cannot be found with its fingerprint.
  """
  from pivot_jax.data.tokenizer import load_tokenizer
  from pivot_jax.weights import checkpoint

  check_choices(format, dtype)
  _check_target(files.local_path(to, "--to"))
  loaded = checkpoint.load(address, deferred=True)
  # An encoder is written without its language model, which is not even read.
  params = parts_of(loaded.params, format)
  meta, rest = dict(loaded.meta), None
  if "vision" in params:
    rest, meta["unread"] = checkpoint.unread(loaded.meta, source=source)
  tokenizer = None
  if "llm" in params:
    tokenizer = load_tokenizer(addresses.tokenizer_folder(address))
  job = Job(
    params=params,
    meta=meta,
    unread=rest,
    tokenizer=tokenizer,
    dtype=dtype,
    name=address,
    folder=loaded.folder,
  )
  return write(job, to, format=format)


def parts_of(params: Mapping[str, Any], format: str) -> dict[str, Any]:
  """Return the parts of a model that a format holds."""
  wanted = _PARTS[format]
  if format == "hf" and "vision" not in params:
    wanted = ("llm",)
  return {part: tree for part, tree in params.items() if part in wanted}


def write(job: Job, to: str | os.PathLike, *, format: str) -> pathlib.Path:
  """Write a job's folder, whole or not at all; return the folder."""
  from pivot_jax.weights import card

  out = files.local_path(to, "--to")
  check_choices(format, job.dtype)
  _check_target(out)
  writers: dict[str, Callable[[Job, pathlib.Path], str]] = {
    "hf": _hf,
    "llava": _llava,
    "timm": _timm,
    "big_vision": _big_vision,
  }
  with files.writing_folder(out) as folder:
    use = writers[format](job, folder)
    words = card.text(job.meta, job.folder, job.name, use)
    files.write_text(folder / "README.md", words)
  return out


def check_choices(format: str, dtype: str) -> None:
  if format not in FORMATS:
    raise InputError(f"format {format!r}: choose one of {', '.join(FORMATS)}")
  if dtype not in DTYPES:
    raise InputError(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")


def _check_target(out: pathlib.Path) -> None:
  if out.exists() or out.is_symlink():
    raise InputError(f"{out}: is there already; give a folder that is not")


def _encoder(job: Job) -> dict[str, Any]:
  """Return the arguments about the encoder that the formats share."""
  from pivot_jax.weights import checkpoint

  return dict(
    unread=job.unread,
    resample=checkpoint.resample(job.meta) or "bicubic",
    dtype=job.dtype,
  )


def _need(job: Job, *parts: str) -> None:
  absent = [part for part in parts if part not in job.params]
  if absent:
    raise InputError(
      f"{job.name}: holds no {absent[0]}, only"
      f" {', '.join(sorted(job.params)) or 'other parts'}, so it cannot be written"
      " in this format (hf, timm and big_vision take an encoder alone, llava a"
      " whole MLLM)"
    )


def _vision(job: Job) -> "vit.VisionConfig":
  from pivot_jax.weights import checkpoint

  _need(job, "vision")
  vision, _ = checkpoint.configs(job.meta)
  assert vision is not None
  return vision


def _llm(job: Job) -> "qwen2.LLMConfig":
  """Return the language model, whose table has a row for each token."""
  from pivot_jax.weights import checkpoint

  _need(job, "llm")
  _, llm = checkpoint.configs(job.meta)
  assert llm is not None
  job.tokenizer.check_vocabulary(llm.vocab_size, job.name)
  return llm


def _hf(job: Job, out: pathlib.Path) -> str:
  from pivot_jax.weights.convert import hf, hf_config, llava

  if "vision" in job.params:
    vision = _vision(job)
    hf.save_vision(out, vision, job.params["vision"], **_encoder(job))
    return hf_config.class_of(vision)
  hf.save_llm(
    out,
    _llm(job),
    job.params["llm"],
    eos_token_id=job.tokenizer.im_end,
    dtype=job.dtype,
  )
  llava.write_tokenizer(
    out, job.tokenizer.backend, image_token=False, template=_template(job)
  )
  llava.write_generation(out, job.tokenizer, suppress=[])
  return "Qwen2ForCausalLM"


def _llava(job: Job, out: pathlib.Path) -> str:
  from pivot_jax.weights.convert import hf, llava

  _need(job, "vision", "projector", "llm")
  vision, tokenizer = _vision(job), job.tokenizer
  _, image_id = llava.with_image_token(tokenizer)
  llm, decoder = llava.widen(
    _llm(job), job.params["llm"], image_id, tokenizer.end_of_text
  )
  hf.save_llava(
    out,
    vision,
    llm,
    {**job.params, "llm": decoder},
    image_token_id=image_id,
    eos_token_id=tokenizer.im_end,
    **_encoder(job),
  )
  llava.write_beside(
    out, vision=vision, tokenizer=tokenizer, template=_template(job)
  )
  return "LlavaForConditionalGeneration"


def _template(job: Job) -> str:
  """Return the template that the model was trained with."""
  return job.meta.get("template", "qwen_1_5")


def _timm(job: Job, out: pathlib.Path) -> str:
  from pivot_jax.weights.convert import timm

  timm.save(out, _vision(job), job.params["vision"], **_encoder(job))
  return "timm"


def _big_vision(job: Job, out: pathlib.Path) -> str:
  from pivot_jax.weights.convert import big_vision

  vision = _vision(job)
  # The size stands in the name: the grid of patches alone does not tell it.
  big_vision.save(
    out / f"siglip_{vision.image_size}.npz",
    vision,
    job.params["vision"],
    unread=job.unread,
    dtype=job.dtype,
  )
  return "big_vision"


def main(argv: Sequence[str]) -> None:
  """Export what the flags say."""
  del argv
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  output.log()
  given = {flag: flags.FLAGS[flag].value for flag in _FLAGS}
  try:
    out = export(given.pop("from"), given.pop("to"), **given)
  except (InputError, OSError) as error:
    command_line.leave(f"error: {error}", command_line.EXIT_INPUT)
  output.show([f"wrote {out}"])


def run(command: str = "python -m pivot_jax.export") -> None:
  """Parse flags, answer a wrong one in a line, and run `main`.

  `command` is how the command line begins, for messages.
  """
  # Not when the module is imported: a program that calls `pivot_jax.load` may
  # have flags of these names.
  for flag, text in _FLAGS.items():
    if flag in _CHOICES:
      choices = _CHOICES[flag]
      flags.DEFINE_enum(flag, choices[0], choices, text)
    else:
      flags.DEFINE_string(flag, None, text)
  text = f"usage: {command} --from=ADDRESS --to=DIR [flags]\n\n{__doc__}"
  command_line.answer_help(sys.argv, text, list(_FLAGS))
  missing = {
    "from": "--from is missing: give the address of the weights",
    "to": "--to is missing: give the folder to write",
  }

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return command_line.parse(argv, missing=missing)
    except InputError as error:
      command_line.leave(f"error: {error}", command_line.EXIT_INPUT)

  app.run(main, flags_parser=parse)
