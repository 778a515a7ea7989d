"""Turns conversations into token ids and targets; the one file with a template.

Three templates (`qwen_1_5`, the paper's; `qwen2_5`, with that model's own system
prompt; `plain`, a caption alone) and two masks (`paper` and `answer`).
Text is never trusted with special tokens: the only ChatML tokens in the result
are those that the template placed, and `<image>` becomes `IMAGE_TOKEN` only
where the image belongs. It does not pack, truncate or look at images, and its
errors name no row: the caller knows the file and the row, and adds them.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from pivot_jax.data.tokenizer import (
  IMAGE,
  IMAGE_TOKEN,
  SPECIALS,
  Tokenizer,
  encode,
)
from pivot_jax.errors import InputError

# What each template in ChatML opens with: LLaVA's choice, which the paper's code
# took over, and that of Qwen2.5's tokenizer.
SYSTEMS = {
  "qwen_1_5": "You are a helpful assistant.",
  "qwen2_5": (
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
  ),
}
TEMPLATES = (*SYSTEMS, "plain")
MASKS = ("paper", "answer")

_ROLES = {
  "human": "user",
  "user": "user",
  "gpt": "assistant",
  "assistant": "assistant",
}
# A marker that the paper's mixture left in its texts; its code deletes it.
_MARKER = "QA_GT_caption_based_noisy"


class Encoded(NamedTuple):
  """One example: a prompt and the answers that continue it.

  A token is a target iff its own flag is True; what predicts it is the token
  before it, in the prompt for the first token of an answer. `IMAGE_TOKEN` stands
  for each image; an answer holds it where a later question shows an image.
  """

  prompt: Int32[np.ndarray, "p"]
  prompt_targets: Bool[np.ndarray, "p"]
  answers: tuple[Int32[np.ndarray, "a"], ...]
  answer_targets: tuple[Bool[np.ndarray, "a"], ...]


def encode_conversation(
  tokenizer: Tokenizer,
  conversations: Sequence[Mapping[str, str]],
  *,
  template: str,
  mask: str,
  images: int = 1,
) -> Encoded:
  """Encode LLaVA turns as a prompt and one answer branch (paper.md 1.8).

  The branch starts at the first assistant turn's `<|im_start|>` and runs to the
  end, later questions included. Template `plain` is the caption and a newline
  after the image, all of it a target under either mask. For the others:

  - mask `paper`: every token of an assistant turn, from its `<|im_start|>` to
    the newline after `<|im_end|>`, and in the system and user turns every
    `<|im_start|>` and every lone newline token, as the paper's code does;
  - mask `answer`: only the content of assistant turns and its `<|im_end|>`. A
    token that fuses the header's newline with leading white space of the
    content counts as content.

  Args:
    images: how many the row has. A turn's only `<image>` goes to its front, as
      in the paper's code, several stay where they are; a row's one image needs
      none, and is put before the first question.

  Raises:
    InputError: a turn that cannot be used; the message names no row.
  """
  _check_choice(template, mask)
  turns = _read_turns(conversations)
  first = next((i for i, t in enumerate(turns) if t[0] == "assistant"), None)
  if first is None:
    raise InputError("conversations: no answer; add a turn from gpt")
  if first == 0:
    raise InputError("conversations: no question; add a turn from human")
  turns = _place_images(turns, images)
  for role, content in turns:
    if role == "assistant":
      _check_answer("conversations", content)
  if template == "plain":
    return _encode_plain(tokenizer, turns, images)
  prompt, prompt_targets = _encode_turns(
    tokenizer, [("system", system(template)), *turns[:first]], mask
  )
  answer, targets = _encode_turns(tokenizer, turns[first:], mask)
  return Encoded(prompt, prompt_targets, (answer,), (targets,))


def encode_pair(
  tokenizer: Tokenizer,
  question: str,
  chosen: str,
  rejected: str,
  *,
  template: str,
  mask: str,
  images: int = 1,
) -> Encoded:
  """Encode a preference pair: branch 0 is chosen, branch 1 rejected.

  As in the paper's code the image always opens the question, which is stripped
  of white space; several stay where their tags are. The masks are those of
  `encode_conversation`.

  Raises:
    InputError: an unusable answer, equal answers, or template `plain`.
  """
  _check_choice(template, mask)
  if template == "plain":
    raise InputError("template plain has no preference pairs; use qwen_1_5")
  _check_answer("chosen", chosen)
  _check_answer("rejected", rejected)
  user = _place_in_question(question, images, strip=True)
  prompt, prompt_targets = _encode_turns(
    tokenizer, [("system", system(template)), ("user", user)], mask
  )
  branches = [
    _encode_turns(tokenizer, [("assistant", text)], mask)
    for text in (chosen, rejected)
  ]
  answers, targets = zip(*branches)
  if np.array_equal(*answers):
    raise InputError(
      "chosen and rejected are equal; remove the pair", kind="equal_pair"
    )
  return Encoded(prompt, prompt_targets, answers, targets)


def encode_prompt(
  tokenizer: Tokenizer,
  question: str,
  *,
  images: int = 1,
  template: str = "qwen_1_5",
) -> Encoded:
  """Encode a question for generation; it ends after the assistant's header.

  What was trained by `plain` is asked in `qwen_1_5`.
  """
  user = _place_in_question(question, images, strip=False)
  turns = [("system", system(template)), ("user", user)]
  ids, _ = _encode_turns(tokenizer, turns, "answer")
  header = [tokenizer.im_start, *tokenizer.encode("assistant\n")]
  ids = np.concatenate([ids, np.asarray(header, np.int32)])
  return Encoded(ids, np.zeros(len(ids), bool), (), ())


def system(template: str) -> str:
  """Return the system prompt that goes with a template."""
  return SYSTEMS["qwen_1_5" if template == "plain" else template]


def _check_choice(template: str, mask: str) -> None:
  if template not in TEMPLATES:
    raise InputError(f"template {template!r} is none of {', '.join(TEMPLATES)}")
  if mask not in MASKS:
    raise InputError(f"mask {mask!r} is none of {', '.join(MASKS)}")


def _check_answer(field: str, text: str) -> None:
  if not isinstance(text, str):
    raise InputError(f"{field}: an answer must be text, not {text!r}")
  if not text.strip():
    raise InputError(
      f"{field}: an answer is empty; remove the row", kind="empty_answer"
    )
  for name in (IMAGE, *SPECIALS):
    if name in text:
      raise InputError(
        f"{field}: an answer contains {name}; remove it",
        kind="placeholders" if name == IMAGE else "special_token",
      )


def _read_turns(conversations) -> list[tuple[str, str]]:
  """Return (role, content) pairs; a leading answer is dropped as in 1.8."""
  if not isinstance(conversations, Sequence) or isinstance(conversations, str):
    raise InputError("conversations: must be a list of turns")
  turns = [_read_turn(i, turn) for i, turn in enumerate(conversations)]
  if turns and turns[0][0] == "assistant":
    turns = turns[1:]
  return turns


def _read_turn(index: int, turn) -> tuple[str, str]:
  where = f"conversations[{index}]"
  if not isinstance(turn, Mapping):
    raise InputError(f"{where}: must have the keys from and value")
  role = turn.get("from", turn.get("role"))
  content = turn.get("value", turn.get("content"))
  if not isinstance(role, str) or role not in _ROLES:
    raise InputError(f"{where}: unknown role {role!r}; use human or gpt")
  if not isinstance(content, str):
    raise InputError(f"{where}: value must be text, not {content!r}")
  return _ROLES[role], content.replace(_MARKER, "")


def _place_images(turns, images: int):
  """Give the example one `<image>` for each image."""
  asked = [content for role, content in turns if role == "user"]
  tags = sum(content.count(IMAGE) for content in asked)
  _check_count(tags, images)
  placed = []
  for index, (role, content) in enumerate(turns):
    if role == "user" and not tags and index == 0:
      content = f"{IMAGE}\n" * images + content
    elif role == "user" and content.count(IMAGE) == 1:
      content = _to_front(content)
    placed.append((role, content))
  return placed


def _place_in_question(question: str, images: int, *, strip: bool) -> str:
  if not isinstance(question, str):
    raise InputError(f"question: must be text, not {question!r}")
  tags = question.count(IMAGE)
  _check_count(tags, images)
  if tags > 1:
    return question.strip() if strip else question
  if strip:
    question = question.replace(IMAGE, "").strip()
  if IMAGE in question:
    return _to_front(question)
  return f"{IMAGE}\n" * images + question


def _check_count(tags: int, images: int) -> None:
  # Where one image belongs is known; where several do, only tags can tell.
  if tags != images and (tags or images > 1):
    have = {0: "no image", 1: "one image"}.get(images, f"{images} images")
    raise InputError(
      f"the text has {tags} {IMAGE} but the row has {have}",
      kind="placeholders",
    )


def _to_front(content: str) -> str:
  if content.startswith(IMAGE):
    return content
  return f"{IMAGE}\n{content.replace(IMAGE, '').strip()}".strip()


def _encode_plain(tokenizer: Tokenizer, turns, images: int) -> Encoded:
  roles = [role for role, _ in turns]
  if roles != ["user", "assistant"]:
    raise InputError("conversations: template plain needs one human, one gpt")
  if images != 1:
    raise InputError(
      f"image: template plain needs one, not {images}; give it in the row"
    )
  ids = np.asarray(tokenizer.encode(turns[1][1] + "\n"), np.int32)
  prompt = np.asarray([IMAGE_TOKEN], np.int32)
  targets = np.ones(len(ids), bool)
  return Encoded(prompt, np.zeros(1, bool), (ids,), (targets,))


def _encode_turns(tokenizer: Tokenizer, turns, mask: str):
  encoded = [_encode_turn(tokenizer, role, text, mask) for role, text in turns]
  ids, targets = zip(*encoded)
  return np.concatenate(ids), np.concatenate(targets)


# Turns repeat a lot (short answers, fixed questions), so both caches pay.
@functools.lru_cache(maxsize=2**14)
def _encode_turn(tokenizer: Tokenizer, role: str, content: str, mask: str):
  """Encode `<|im_start|>{role}\\n{content}<|im_end|>\\n` as one text.

  A special token splits the text before anything else is done to it, so the
  pieces between those of the template are encoded on their own.
  """
  header = f"{role}\n"
  pieces = [header + content]
  if role == "user":
    pieces = pieces[0].split(IMAGE)
  ids, ends = encode(tokenizer, pieces[0])
  body = [ids]
  for piece in pieces[1:]:
    body += [[IMAGE_TOKEN], encode(tokenizer, piece)[0]]
  tail = [tokenizer.im_end, *tokenizer.encode("\n")]
  ids = np.concatenate([[tokenizer.im_start], *body, tail]).astype(np.int32)
  targets = np.zeros(len(ids), bool)
  if mask == "paper" and role == "assistant":
    targets[:] = True
  elif mask == "paper":
    targets[:] = np.isin(ids, [tokenizer.newline, tokenizer.im_start])
  elif role == "assistant":
    start = 1 + int((ends <= len(header)).sum())
    targets[start : len(ids) - len(tail) + 1] = True
  return ids, targets
