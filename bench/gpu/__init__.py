"""One GPU: the smoke test, and an update of real size beside TRL and torch.

In reading order: `smoke.py` starts the checks of `checks.py` and needs no peer
and no network; `sizes.py` holds the model and its data; `ours.py`,
`torch_peer.py` and `trl_peer.py` are the sides, `rows.py` the benchmark's rows.
"""
