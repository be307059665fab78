"""What `sluice up` shows once everything runs."""

import os
import sys
from pathlib import Path

from deploy.install import GPU_INSTALL
from tasks.contract.models import Catalog
from tasks.contract.settings import Settings

_TEXT = """
  Sluice is ready:  {url}      API and docs: {url}/docs

  curl -N {url}/v1/chat/completions \\
    -H 'Content-Type: application/json' -d '{{"message": "Hello"}}'

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  question = [{{"role": "user", "content": "What is Sluice?"}}]
  for chunk in client.chat.completions.create(model="{model}", messages=question, stream=True):
      print(chunk.choices[0].delta.content or "", end="", flush=True)

  Model       {model}{note}
  Your own    {sluice} up --model Qwen/Qwen3-0.6B      (a Hub id or a directory)
  On a GPU    {gpu}
  Logs        {home}/logs
  Status      {sluice} status      (also: doctor, jobs, submit, watch, drain, pause, dead)
  Stop        Ctrl-C
"""


def welcome(settings: Settings, catalog: Catalog) -> str:
    """How to use what runs now."""
    model = catalog.default
    notes = {
        "bundled": ": a tiny demo that knows a little about Sluice and nothing else",
        "sim": ": simulated, no model at all",
    }
    note = notes.get(model.engine, "") or notes.get(model.source, "")
    sluice = os.path.relpath(Path(sys.executable).with_name("sluice"))
    values = {"model": model.name, "note": note, "home": settings.home, "gpu": GPU_INSTALL}
    values |= {"sluice": sluice}
    return _TEXT.format(url=settings.local_url, **values)
