"""The peers from TRL: DPOTrainer and SFTTrainer on fixed tensors.

Each runs its own training loop; a callback opens and closes the clock around a
step, so that forward passes (the reference model's too), backward pass,
clipping, optimizer, scheduler and TRL's metrics are in it, and collation and
logging are not. The collator returns the same tensors every time: no tokenizer
or image processor runs. "Tuned" switches off gradient checkpointing and the
regular log, "default" leaves both as TRL has them; float32 in both, where
TRL's own default is bfloat16 autocast.
"""

import copy
import pathlib

import datasets
import tokenizers
import torch
import transformers
import trl

from bench import harness
from bench.update import torch_peer, toy


def dpo(folder: pathlib.Path, **how) -> harness.Ready:
  """Return DPOTrainer with a copy of the model as explicit reference.

  `how` is passed to `_arguments`: tuned, compiled.
  """
  data = toy.read(folder)
  model = torch_peer.load(data)
  batch = torch_peer.tensors(data, ("chosen", "rejected"))
  inputs = _inputs(batch) | {"completion_mask": batch.answer_mask}

  def make(steps, callbacks):
    return Dpo(
      model=model,
      ref_model=copy.deepcopy(model).eval(),
      args=trl.DPOConfig(
        **_arguments(folder, data, steps, **how),
        beta=torch_peer.BETA,
        disable_dropout=True,
      ),
      train_dataset=dataset(
        steps * data.sizes["pairs"], "prompt", "chosen", "rejected"
      ),
      data_collator=lambda rows: dict(inputs),
      processing_class=processor(data.sizes["image"]),
      callbacks=callbacks,
    )

  return _ready(model, batch, make)


def sft(folder: pathlib.Path, **how) -> harness.Ready:
  """Return SFTTrainer on the chosen answers, the prompts masked."""
  data = toy.read(folder)
  model = torch_peer.load(data)
  batch = torch_peer.tensors(data, ("chosen",))
  inputs = _inputs(batch) | {"labels": _labels(batch)}

  def make(steps, callbacks):
    return Sft(
      model=model,
      args=trl.SFTConfig(**_arguments(folder, data, steps, **how)),
      train_dataset=dataset(
        steps * data.sizes["pairs"], "prompt", "completion"
      ),
      data_collator=lambda rows: dict(inputs),
      processing_class=processor(data.sizes["image"]),
      callbacks=callbacks,
    )

  return _ready(model, batch, make)


def _ready(model, batch: torch_peer.Tensors, make) -> harness.Ready:
  seen = torch_peer.Seen(model)

  def drive(count, begin, end):
    trainer = make(count, [Clock(begin, end)])
    trainer.seen = seen
    # Through the head that the trainer has put on the model.
    with torch.no_grad():
      scored = trainer.model(
        **_inputs(batch), labels=_labels(batch), fused_lm_head=True
      )
    seen.score(scored.log_probs)
    trainer.train()

  return harness.Ready(drive=drive, numbers=seen.numbers)


class Clock(transformers.TrainerCallback):
  def __init__(self, begin, end):
    self._begin, self._end = begin, end

  def on_step_begin(self, args, state, control, **kwargs):
    self._begin()

  def on_step_end(self, args, state, control, **kwargs):
    self._end()


class _Watched:
  """Keep loss and gradient norm of every step, which a log would average."""

  seen: torch_peer.Seen

  def training_step(self, *args, **kwargs):
    self._loss = super().training_step(*args, **kwargs)
    return self._loss

  def _clip_grad_norm(self, model):
    norm = super()._clip_grad_norm(model)
    self.seen.add(self._loss, norm)
    return norm


class Dpo(_Watched, trl.DPOTrainer):
  pass


class Sft(_Watched, trl.SFTTrainer):
  pass


def arguments(
  folder: pathlib.Path,
  *,
  steps: int,
  batch: int,
  longest: int,
  tuned: bool,
  compiled: bool = False,
  bf16: bool = False,
) -> dict:
  """Return the arguments of either trainer; `longest` is a sequence's."""
  found = dict(
    output_dir=str(folder / "trl"),
    max_steps=steps,
    per_device_train_batch_size=batch,
    learning_rate=torch_peer.LEARNING_RATE,
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=torch_peer.CLIP,
    # Nothing is cut off: it holds image, prompt and answer.
    max_length=max(1024, 2 * longest),
    bf16=bf16,
    use_cpu=torch_peer.DEVICE == "cpu",
    torch_compile=compiled,
    dataloader_num_workers=0,
    dataloader_pin_memory=False,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
  )
  if tuned:
    found |= dict(gradient_checkpointing=False, logging_steps=10**6)
  return found


def _arguments(folder, data: toy.Toy, steps: int, **how) -> dict:
  return arguments(
    folder,
    steps=steps,
    batch=data.sizes["pairs"],
    longest=data.prompt_tokens + data.sizes["answer"],
    **how,
  )


def _inputs(batch: torch_peer.Tensors) -> dict[str, torch.Tensor]:
  return {
    "input_ids": batch.ids,
    "attention_mask": torch.ones_like(batch.ids),
    "pixel_values": batch.pixels,
  }


def _labels(batch: torch_peer.Tensors) -> torch.Tensor:
  return batch.ids.masked_fill(batch.answer_mask == 0, -100)


def dataset(rows: int, *texts: str) -> datasets.Dataset:
  """Return as many rows as a run takes; what they hold is never read."""
  return datasets.Dataset.from_dict(
    {"images": list(range(rows))} | {name: ["t2"] * rows for name in texts}
  )


def processor(side: int) -> transformers.ProcessorMixin:
  """Return a processor that the trainers ask for and that is never used."""
  words = {f"t{i}": i for i in range(toy.VOCAB)}
  del words[f"t{toy.PAD_ID}"], words[f"t{toy.IMAGE_ID}"]
  words |= {"<pad>": toy.PAD_ID, "<image>": toy.IMAGE_ID}
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(
      tokenizers.models.WordLevel(words, unk_token="<pad>")
    ),
    pad_token="<pad>",
    eos_token=f"t{toy.EOS_ID}",
    extra_special_tokens={"image_token": "<image>"},
  )
  return transformers.LlavaProcessor(
    image_processor=transformers.SiglipImageProcessor(
      size={"height": side, "width": side}
    ),
    tokenizer=tokenizer,
    patch_size=toy.PATCH,
    vision_feature_select_strategy="full",
  )


MAKERS = {"dpo": dpo, "sft": sft}
