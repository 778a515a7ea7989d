"""The chat template of an exported folder writes what training reads."""

import jinja2
import pytest

from pivot_jax.data import chat
from pivot_jax.data.tokenizer import load_tokenizer
from pivot_jax.weights import checkpoint
from pivot_jax.weights.convert import llava_files


@pytest.mark.parametrize("template", chat.TEMPLATES)
def test_the_template_writes_the_prompt_that_is_asked(template):
  tokenizer = load_tokenizer(checkpoint.tokenizer_folder("package:toy"))
  wanted = chat.encode_prompt(tokenizer, "what is it ?", template=template)
  content = [{"type": "image"}, {"type": "text", "text": "what is it ?"}]
  said = jinja2.Template(llava_files.chat_template(template)).render(
    messages=[{"role": "user", "content": content}],
    add_generation_prompt=True,
  )
  assert said == tokenizer.decode(wanted.prompt)
  assert chat.system(template) in said
