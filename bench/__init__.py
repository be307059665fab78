"""Sluice against vLLM's own server: same model, same engine arguments, same payloads, same machine.

    python -m bench                 both servers, interleaved rounds, a table; then the jobs API
    python -m bench jobs            the jobs API alone, with a simulated engine
    python -m bench peers           beside LiteLLM and vLLM's router, too; and the queue alone
    python -m bench gpu             beside `vllm serve` on a GPU, with faults
    python -m bench profile         what each process and step costs, in µs
    python -m bench --json out.json the same figures for programs
    python -m bench --memory        10,000 requests through Sluice, and its API's memory on the way

It prints; it never passes or fails on speed. It needs vLLM and a checkout, with its `tests`. What
does pass or fail is `sluice bench` (`deploy/gate.py`): the same load on a server that runs already,
beside a run kept earlier (`baseline.py`); with `--sweep` (`deploy/sweep.py`) more and more of it,
beside a sweep kept earlier (`sweep.py`, drawn by `saturation.py`). `load/` is for Locust and wrk.

Open `__main__.py` first, then `client.py` (the load) with `drive.py` (which starts it),
`stacks.py` (what is started), `processes.py` (CPU and memory by role) and `report.py` (the tables);
for the jobs API, `jobs.py`; for the peers, `peers/`; for GPUs, `gpu/`; for the budget, `profile.py`
with `steps.py`.
"""
