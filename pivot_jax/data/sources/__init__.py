"""Readers of data files, each a `rows.Source`.

In reading order:
  records        strict reading of JSON records and of their fields
  json_index     random access to the records of a JSON file of any size
  json_records   LLaVA conversations, preference pairs, evaluation questions
  folders        images by class, images with label maps
  mixtures       many LLaVA files as LLaVA-OneVision's YAML lists them
  mmpr           MMPR's many files
  mmpr_selection the paper's sets of MMPR's rows
  parquet        Hugging Face's files; parquet_files: access to their rows;
                 parquet_sizes: what a row group decodes to
  array_record   the format of `data convert`: any row at one read
  tfds           prepared TensorFlow Datasets

`data/opener.py` chooses among them.
"""
