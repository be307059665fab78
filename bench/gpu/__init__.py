"""Sluice beside `vllm serve` on a GPU: a comparison, and faults; its model needs no download.

    python -m bench gpu                     both parts; tables in Markdown
    python -m bench gpu compare --json F    one part, and every round in a file

Open `servers.py` first (what is started), then `compare.py` and `faults.py`. The model has the
shape of a Llama and no weights: `model.py` writes it, `weights.py` fills it. `pack.py` takes what
all this needs to a machine without a network. How to run it is in docs/gpu.md.
"""
