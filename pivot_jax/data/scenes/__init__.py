"""Procedural scenes with captions, questions and pairs: the embedded data.

In reading order:

  scenes.py           `Scenes`, the source: rows for every stage
  descriptions.py     the objects of a scene and their places
  drawing.py          the pixels of a scene
  questions.py        captions, questions, right and wrong answers
  counterfactuals.py  captions and thoughts that are wrong in one detail
  tokenizer.py        makes the tokenizer of the toy model from the words
"""
