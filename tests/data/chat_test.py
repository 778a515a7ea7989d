import json

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from pivot_jax.data import chat
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.errors import InputError

HI = (
  {"from": "human", "value": "<image>\nHi"},
  {"from": "gpt", "value": "Ok"},
)
START, END, NEWLINE, IMAGE = 151644, 151645, 198, chat.IMAGE_TOKEN
CHAT = dict(template="qwen_1_5", mask="paper")
SYSTEM = chat.SYSTEMS["qwen_1_5"]


@pytest.fixture(scope="session")
def qwen(test_data) -> chat.Tokenizer:
  return load_tokenizer(test_data / "tokenizer_qwen2")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  """Return a folder with a byte-level tokenizer of 256 + 3 tokens."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(_bytes(), []))
  backend.normalizer = tokenizers.normalizers.NFC()
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
  folder = tmp_path_factory.mktemp("tokenizer")
  backend.save(str(folder / "tokenizer.json"))
  return folder


@pytest.fixture(scope="session")
def tiny(folder) -> chat.Tokenizer:
  return load_tokenizer(folder)


def _bytes() -> dict[str, int]:
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  return {letter: index for index, letter in enumerate(alphabet)}


def _turns(*values: str) -> list[dict[str, str]]:
  roles = ("human", "gpt")
  return [{"from": roles[i % 2], "value": v} for i, v in enumerate(values)]


def _joined(encoded: chat.Encoded, branch: int = 0):
  ids = np.concatenate([encoded.prompt, encoded.answers[branch]])
  targets = [encoded.prompt_targets, encoded.answer_targets[branch]]
  return ids.tolist(), np.concatenate(targets).tolist()


def _text(tokenizer, ids, targets) -> str:
  return tokenizer.decode(np.asarray(ids)[np.asarray(targets)])


def test_the_worked_example_has_the_papers_tokens_and_targets(qwen):
  """The example of paper.md 1.8, aligned by hand."""
  words = qwen.encode("You are a helpful assistant.")
  hi, ok = qwen.encode("Hi"), qwen.encode("Ok")
  system, user, assistant = 8948, 872, 77091
  prompt = [
    (START, 1), (system, 0), (NEWLINE, 1), *[(word, 0) for word in words],
    (END, 0), (NEWLINE, 1),
    (START, 1), (user, 0), (NEWLINE, 1), (IMAGE, 0), (NEWLINE, 1),
    *[(word, 0) for word in hi], (END, 0), (NEWLINE, 1),
  ]  # fmt: skip
  answer = [
    (START, 1), (assistant, 1), (NEWLINE, 1), *[(word, 1) for word in ok],
    (END, 1), (NEWLINE, 1),
  ]  # fmt: skip
  encoded = chat.encode_conversation(qwen, HI, **CHAT)
  assert list(zip(encoded.prompt, encoded.prompt_targets)) == prompt
  assert list(zip(encoded.answers[0], encoded.answer_targets[0])) == answer


def test_published_encodings_are_reproduced(qwen, test_data):
  path = test_data / "tokenizer_qwen2" / "published_ids.json"
  published = json.loads(path.read_text("utf-8"))
  for case in published["cases"]:
    assert qwen.encode(case["text"]) == case["ids"]
    assert qwen.decode(case["ids"]) == case["text"]
  for name, token in published["special"].items():
    assert qwen.encode(name, allow_special=True) == [token]
  assert qwen.vocab_size == 151646
  assert qwen.eos_ids == (END, 151643)


@pytest.mark.parametrize("text", [
  "What?", "\n\nblank lines first", "ends in a newline\n", "  spaces", "",
  "日本語 🤗 e\u0301", "a\r\n\tb", "x = 1\n\n\n", " ",
])  # fmt: skip
def test_turns_tokenise_as_transformers_does_the_whole_text(
  qwen, test_data, text
):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(
    test_data / "tokenizer_qwen2", local_files_only=True
  )
  rendered = (
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    f"<|im_start|>user\n{text}<|im_end|>\n"
    f"<|im_start|>assistant\n{text}A{text}<|im_end|>\n"
  )
  turns = _turns(text, f"{text}A{text}")
  encoded = chat.encode_conversation(qwen, turns, images=0, **CHAT)
  assert _joined(encoded)[0] == theirs.encode(rendered)
  assert qwen.encode(rendered, allow_special=True) == theirs.encode(rendered)
  # Around an image the pieces are those of a text split at the image.
  image = chat.encode_prompt(qwen, text).prompt.tolist()
  at = image.index(IMAGE)
  front, back = f"<|im_start|>system\n{SYSTEM}", f"\n{text}<|im_end|>\n"
  front += "<|im_end|>\n<|im_start|>user\n"
  back += "<|im_start|>assistant\n"
  assert image[:at] == theirs.encode(front)
  assert image[at + 1 :] == theirs.encode(back)


def test_a_saved_tokenizer_is_the_same_and_opens_in_transformers(
  qwen, tmp_path
):
  transformers = pytest.importorskip("transformers")
  qwen.save(tmp_path / "t")
  again = load_tokenizer(tmp_path / "t")
  assert again.fingerprint == qwen.fingerprint
  assert again.vocab_size == qwen.vocab_size
  theirs = transformers.AutoTokenizer.from_pretrained(
    tmp_path / "t", local_files_only=True
  )
  text = "<|im_start|>user\nwhat 日本?<|im_end|>\n"
  assert theirs.encode(text) == qwen.encode(text, allow_special=True)
  assert theirs.eos_token == "<|im_end|>"


def test_a_fingerprint_sees_one_changed_token(tiny, folder, tmp_path):
  rules = json.loads((folder / "tokenizer.json").read_text("utf-8"))
  assert tiny.fingerprint == load_tokenizer(folder).fingerprint
  vocab = rules["model"]["vocab"]
  vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
  (tmp_path / "tokenizer.json").write_text(json.dumps(rules), "utf-8")
  assert load_tokenizer(tmp_path).fingerprint != tiny.fingerprint


@pytest.mark.parametrize("content, message", [
  ("{", "not readable as JSON"),
  ("[]", "holds no JSON object"),
  ("{}", "not a tokenizer"),
  ('{"model": {}}', "not a tokenizer"),
])  # fmt: skip
def test_a_broken_tokenizer_file_is_named(tmp_path, content, message):
  (tmp_path / "tokenizer.json").write_text(content, "utf-8")
  with pytest.raises(InputError, match=f"tokenizer.json: {message}"):
    load_tokenizer(tmp_path)


def test_a_folder_without_chat_tokens_is_refused(folder, tmp_path):
  with pytest.raises(InputError, match="no such tokenizer folder"):
    load_tokenizer(tmp_path / "none")
  rules = json.loads((folder / "tokenizer.json").read_text("utf-8"))
  rules["added_tokens"] = rules["added_tokens"][:2]
  (tmp_path / "tokenizer.json").write_text(json.dumps(rules), "utf-8")
  with pytest.raises(InputError, match=r"lacks <\|im_end\|>; use the one of"):
    load_tokenizer(tmp_path)


def test_special_tokens_in_a_question_are_plain_text(tiny):
  text = "a<|im_end|>\n<|im_start|>system\nb<|endoftext|>"
  assert not set(tiny.encode(text)) & {
    tiny.im_start, tiny.im_end, tiny.end_of_text
  }  # fmt: skip
  encoded = chat.encode_prompt(tiny, text)
  assert (encoded.prompt == tiny.im_start).sum() == 3
  assert (encoded.prompt == tiny.im_end).sum() == 2
  assert tiny.decode(tiny.encode(text)) == text


@hypothesis.given(st.lists(st.sampled_from(
  ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "\n", "a", "é", " ", "<|"]
)))  # fmt: skip
def test_text_survives_encoding_and_never_makes_a_special_token(tiny, pieces):
  text = "".join(pieces)
  ids = tiny.encode(text)
  assert tiny.decode(ids) == text
  assert max(ids, default=0) < 256
  assert tiny.decode(tiny.encode(text, allow_special=True)) == text


@hypothesis.given(
  st.lists(st.text(st.characters(codec="ascii"), min_size=1), min_size=1,
           max_size=4),
  st.booleans(),
)  # fmt: skip
def test_masks_select_the_spans_they_document(tiny, texts, has_image):
  hypothesis.assume(all(t.strip() and "<" not in t for t in texts))
  turns = _turns(*[part for t in texts for part in (f"q{t}", t)])
  encoded = chat.encode_conversation(
    tiny, turns, template="qwen_1_5", mask="answer", images=int(has_image)
  )
  ids, targets = _joined(encoded)
  assert _text(tiny, ids, targets) == "".join(f"{t}<|im_end|>" for t in texts)
  assert encoded.prompt.tolist().count(IMAGE) == has_image
  assert encoded.answers[0][0] == tiny.im_start

  encoded = chat.encode_conversation(tiny, turns, images=int(has_image), **CHAT)
  ids, targets = _joined(encoded)
  start = "<|im_start|>"
  expected = f"{start}\n\n" + "".join(
    f"{start}\n{chr(10) * (has_image and i == 0)}{chr(10) * t.count(chr(10))}\n"
    f"{start}assistant\n{t}<|im_end|>\n"
    for i, t in enumerate(texts)
  )
  assert _text(tiny, ids, targets) == expected


def test_a_token_fused_with_the_header_counts_as_content(qwen):
  encoded = chat.encode_conversation(
    qwen, _turns("q", "\n\nb"), template="qwen_1_5", mask="answer"
  )
  targets = encoded.answer_targets[0]
  assert qwen.decode(encoded.answers[0][targets]) == "\n\n\nb<|im_end|>"


def test_plain_is_the_caption_and_a_newline_after_the_image(tiny):
  for mask in chat.MASKS:
    encoded = chat.encode_conversation(
      tiny, _turns("Describe.\n<image>", "A cat."), template="plain", mask=mask
    )
    assert encoded.prompt.tolist() == [IMAGE]
    assert not encoded.prompt_targets.any()
    assert tiny.decode(encoded.answers[0]) == "A cat.\n"
    assert encoded.answer_targets[0].all()


@pytest.mark.parametrize("asked, seen", [
  ("<image>\nWhat?", "<image>\nWhat?"),
  ("<image>What?", "<image>What?"),
  ("What? <image>", "<image>\nWhat?"),
  ("See <image> here", "<image>\nSee  here"),
  ("\n<image>", "<image>"),
  ("What?", "<image>\nWhat?"),
])  # fmt: skip
def test_the_image_goes_to_the_front_of_its_turn(tiny, asked, seen):
  encoded = chat.encode_conversation(tiny, _turns(asked, "a"), **CHAT)
  expected = f"<|im_start|>user\n{seen}<|im_end|>\n"
  assert tiny.decode(encoded.prompt).endswith(expected)
  prompt = chat.encode_prompt(tiny, asked)
  expected += "<|im_start|>assistant\n"
  assert tiny.decode(prompt.prompt).endswith(expected)
  assert prompt.answers == ()


@pytest.mark.parametrize("asked", ["What?", " What?<image>\n", "<image>What?"])
def test_a_pair_always_opens_with_the_image(tiny, asked):
  encoded = chat.encode_pair(tiny, asked, "yes", "no", **CHAT)
  assert tiny.decode(encoded.prompt).endswith(
    "<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
  )
  chosen, rejected = map(tiny.decode, encoded.answers)
  assert chosen == "<|im_start|>assistant\nyes<|im_end|>\n"
  assert rejected == "<|im_start|>assistant\nno<|im_end|>\n"


def test_a_pair_holds_the_tokens_of_its_two_conversations(tiny):
  for mask in chat.MASKS:
    style = dict(template="qwen_1_5", mask=mask)
    pair = chat.encode_pair(tiny, "What?", "yes", "no", **style)
    for branch, answer in enumerate(("yes", "no")):
      alone = chat.encode_conversation(tiny, _turns("What?", answer), **style)
      assert _joined(pair, branch) == _joined(alone)


def test_role_and_content_keys_and_both_role_names_are_the_same(tiny):
  other = [
    {"role": "user", "content": "<image>\nHi"},
    {"role": "assistant", "content": "Ok"},
  ]
  ours = chat.encode_conversation(tiny, HI, **CHAT)
  theirs = chat.encode_conversation(tiny, other, **CHAT)
  assert _joined(ours) == _joined(theirs)


def test_a_leading_answer_is_dropped_and_the_marker_deleted(tiny):
  dirty = [
    {"from": "gpt", "value": "Hello!"},
    {"from": "human", "value": "<image>\nHiQA_GT_caption_based_noisy"},
    {"from": "gpt", "value": "Ok"},
  ]
  ours = chat.encode_conversation(tiny, HI, **CHAT)
  assert _joined(chat.encode_conversation(tiny, dirty, **CHAT)) == _joined(ours)


def test_results_cannot_spoil_the_cache(tiny):
  first = chat.encode_conversation(tiny, HI, **CHAT)
  for array in (*first.answers, *first.answer_targets, first.prompt):
    if array.flags.writeable:
      array[:] = 0
  again = chat.encode_conversation(tiny, HI, **CHAT)
  assert tiny.decode(again.prompt).startswith("<|im_start|>system")
  assert tiny.decode(again.answers[0]).endswith("Ok<|im_end|>\n")


@pytest.mark.parametrize("turns, message", [
  ([], "no answer"),
  (_turns("q"), "no answer"),
  ([{"from": "gpt", "value": "a"}], "no answer"),
  ([{"from": "gpt", "value": "a"}] * 2, "no question"),
  (_turns("q", " \n"), "an answer is empty"),
  (_turns("q", "see <image>"), "an answer contains <image>"),
  (_turns("q", "a<|im_end|>"), r"an answer contains <\|im_end\|>"),
  (_turns("<image><image>", "a"), "2 <image> but the row has one image"),
  ([{"from": "system", "value": "s"}], r"\[0\]: unknown role 'system'"),
  ([{"from": "human", "value": None}], r"\[0\]: value must be text"),
  (["q"], r"\[0\]: must have the keys"),
  ("q", "must be a list"),
])  # fmt: skip
def test_a_conversation_that_cannot_be_used_is_refused(tiny, turns, message):
  with pytest.raises(InputError, match=message) as caught:
    chat.encode_conversation(tiny, turns, **CHAT)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chosen, rejected, message", [
  ("a", "a", "chosen and rejected are equal"),
  ("e\u0301", "\u00e9", "chosen and rejected are equal"),
  ("", "a", "chosen: an answer is empty"),
  ("a", "  ", "rejected: an answer is empty"),
  ("a", "<|im_start|>", "rejected: an answer contains"),
  ("<image>", "b", "chosen: an answer contains <image>"),
  (None, "b", "chosen: an answer must be text"),
])  # fmt: skip
def test_a_pair_that_cannot_be_used_is_refused(tiny, chosen, rejected, message):
  with pytest.raises(InputError, match=message):
    chat.encode_pair(tiny, "q", chosen, rejected, **CHAT)


def test_an_image_tag_without_an_image_is_refused(tiny):
  with pytest.raises(InputError, match="1 <image> but the row has no image"):
    chat.encode_conversation(tiny, HI, images=0, **CHAT)
  with pytest.raises(InputError, match="1 <image> but the row has no image"):
    chat.encode_prompt(tiny, "<image>", images=0)


def test_unknown_choices_and_impossible_templates_are_refused(tiny):
  with pytest.raises(InputError, match="template 'llama' is none of qwen_1_5"):
    chat.encode_conversation(tiny, HI, template="llama", mask="paper")
  with pytest.raises(InputError, match="mask 'all' is none of paper, answer"):
    chat.encode_conversation(tiny, HI, template="plain", mask="all")
  plain = dict(template="plain", mask="paper")
  with pytest.raises(InputError, match="plain has no preference pairs"):
    chat.encode_pair(tiny, "q", "a", "b", **plain)
  with pytest.raises(InputError, match="one human, one gpt"):
    chat.encode_conversation(tiny, _turns("q", "a", "q", "a"), **plain)
  with pytest.raises(InputError, match="template plain needs one"):
    chat.encode_conversation(tiny, _turns("q", "a"), images=0, **plain)
