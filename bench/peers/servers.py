"""The peers, each started with the settings that its manual names, and one process of it."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import yaml

from bench.peers.environments import program
from bench.stacks import Stack, launched
from deploy.redis_server import free_port
from tasks.contract.models import Model

SLUICE, VLLM, LITELLM, ROUTER, ALONE = "Sluice", "vLLM", "LiteLLM", "vLLM router", "engine alone"
# Whose processor time is compared: of the process that clients talk to.
ROLES = {SLUICE: "api", LITELLM: "gateway", ROUTER: "gateway"}
HOST = "127.0.0.1"

Gateway = Callable[[str, Sequence[str], Path], AbstractContextManager[Stack]]


@contextmanager
def litellm(model: str, engines: Sequence[str], home: Path) -> Iterator[Stack]:
    """LiteLLM's proxy, without database, in front of the engines at those URLs."""
    config = home / "litellm.yaml"
    entries = [
        {
            "model_name": model,
            "litellm_params": {
                "model": f"hosted_vllm/{model}",
                "api_base": f"{url}/v1",
                "api_key": "none",
            },
        }
        for url in engines
    ]
    config.write_text(yaml.safe_dump({"model_list": entries}))
    port = free_port()
    command = [program("litellm"), "--config", str(config), "--num_workers", "1"]
    command += ["--host", HOST, "--port", str(port)]
    # Prices come with the package; it need not look for newer ones. PRODUCTION: no .env is read.
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    # Like Sluice here, it asks nobody for a key.
    keyless = {"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    env = _bare(home) | quiet | keyless | {"LITELLM_MODE": "PRODUCTION"}
    with launched(LITELLM, command, env, port, "/health/liveliness", home) as launch:
        yield launch.await_ready()


@contextmanager
def vllm_router(_model: str, engines: Sequence[str], home: Path) -> Iterator[Stack]:
    """The router of the vLLM project in front of the engines at those URLs."""
    port = free_port()
    command = [program("vllm-router"), "--host", HOST, "--port", str(port)]
    command += ["--prometheus-port", str(free_port()), "--log-level", "warning"]
    command += ["--policy", "round_robin", "--worker-startup-check-interval", "1"]
    command += ["--worker-urls", *engines]
    with launched(ROUTER, command, _bare(home), port, "/readiness", home) as launch:
        yield launch.await_ready()


GATEWAYS: Sequence[Gateway] = (litellm, vllm_router)


@contextmanager
def sim_server(model: Model, home: Path) -> Iterator[Stack]:
    """The simulated engine as a server."""
    port = free_port()
    command = [sys.executable, "-m", "bench.peers.sim_server", str(port), model.model_dump_json()]
    with launched(ALONE, command, dict(os.environ), port, "/health", home) as launch:
        yield launch.await_ready()


def _bare(home: Path) -> dict[str, str]:
    """No variables of the user's for programs of others, which may hold keys."""
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(home)}
