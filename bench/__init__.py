"""Benchmarks: what an update, an answer, a probe and the input cost.

In reading order. `harness.py` runs variants in processes of their own behind a
gate, `verdict.py` turns what they took into tables, `results.py` writes the
pages of `results/`.

On a CPU, `python -m bench.NAME`: `dpo_cpu.py`, `sft_cpu.py`, `generate_cpu.py`
and `probe_cpu.py` stand beside torch, TRL, transformers and scikit-learn;
`update/` holds the toy model and both sides of an update. `growth.py` varies
the sizes, `padding.py` counts empty slots, `images.py` decodes, `load.py` reads
weights, `data/` opens and packs sources of published size.

`processes.py` trains and reads as several processes of one machine. `restart.py`
kills a training and starts it again, saves large states, and runs the faults of
`faults.py`. `joined/` has their recipe, the marks of time in a run, and starts
the processes.

On a GPU, `gpu/`: `python -m bench.gpu smoke` checks a new machine without any
peer, `python -m bench.gpu` times a model of real size beside TRL and torch.

`report_table.py` and `sweep_table.py` print tables of finished runs.
"""
