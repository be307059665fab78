"""Sluice beside its peers, and the aims that need none: `python -m bench peers`.

The peers are vLLM's own server, LiteLLM's proxy and vLLM's router. The last two are installed from
PyPI on first use, each into an environment of its own (`environments.py`). `litellm.in` and
`vllm-router.in` name their versions, and `make lock` pins all that these need, with hashes. All run
on this machine, on loopback, in front of the same engines: vLLM, or the simulated one as a server
(`sim_server.py`).

Open `parts.py` first: what is measured, in its order. `servers.py` starts the peers, `turns.py` has
the rounds.
"""
