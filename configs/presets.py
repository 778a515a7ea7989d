"""Full-size encoders and language models, as the paper uses them.

Plain fields of `VisionConfig` and `LLMConfig`, so that a recipe can be read
and changed without jax. Weights come from the named Hugging Face models; these
numbers serve to plan a run before they are there, and to check it.
"""

# Published depth; the features come from the block before the last one.
VISION = {
  # google/siglip2-base-patch16-384
  "siglip2-b16-384": dict(
    image_size=384,
    patch_size=16,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
  ),
  # google/siglip2-large-patch16-384
  "siglip2-l16-384": dict(
    image_size=384,
    patch_size=16,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
  ),
  # google/siglip2-so400m-patch16-384
  "siglip2-so400m16-384": dict(
    image_size=384,
    patch_size=16,
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
  ),
  # google/siglip2-giant-opt-patch16-384
  "siglip2-gopt16-384": dict(
    image_size=384,
    patch_size=16,
    hidden_size=1536,
    intermediate_size=6144,
    num_hidden_layers=40,
    num_attention_heads=16,
  ),
  # google/siglip-so400m-patch14-384: 27 x 27 patches, six pixels are cut
  "siglip-so400m14-384": dict(
    image_size=384,
    patch_size=14,
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
  ),
}

_QWEN = dict(vocab_size=151936, rope_theta=1e6, rms_norm_eps=1e-6)

LLM = {
  # Qwen/Qwen2.5-0.5B-Instruct
  "qwen2.5-0.5b": dict(
    _QWEN,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
  ),
  # Qwen/Qwen2.5-1.5B-Instruct
  "qwen2.5-1.5b": dict(
    _QWEN,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    head_dim=128,
    tie_word_embeddings=True,
  ),
  # Qwen/Qwen2.5-3B-Instruct
  "qwen2.5-3b": dict(
    _QWEN,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=128,
    tie_word_embeddings=True,
  ),
  # Qwen/Qwen2.5-7B-Instruct: untied, and more rows in the vocabulary
  "qwen2.5-7b": dict(
    _QWEN,
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    tie_word_embeddings=False,
  ),
}
