"""Starts the parts of Sluice: the program `sluice`, and `sluice up` for all of them on one machine.

May import everything; nothing imports it. Open `cli.py` first, then `up.py`. `install.py` stands
apart: it makes `.venv` before anything is installed.
"""
