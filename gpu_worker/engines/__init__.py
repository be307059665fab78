"""The engines: each module of a kind has an `open_engine`, which gives an ASGI app.

Open `engine.py` first (what a worker needs of one), then `vllm.py`, `sim.py` or `remote.py`; and
`vllm_core.py` for an EngineCore that several front ends share.
"""
