"""Load on a server from outside: simulated users for Locust, and plain requests for wrk.

Open `locustfile.py` first: its classes are the scenarios. `streamed.py` reads a streamed answer and
times it; `post.lua` is for wrk. How to run them is in `docs/load-testing.md`.
"""
