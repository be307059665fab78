"""What is compared on the GPU: Sluice and vLLM's server with each of its front ends."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.cost import make_copy
from bench.gpu import model as shaped
from bench.stacks import Launch, Stack, StackError, launched, launched_sluice
from deploy.redis_server import free_port
from gpu_worker.engines.vllm_args import command_line as engine_arguments
from tasks.contract.models import Model

SLUICE, VLLM = "Sluice", "vLLM"
DEFAULT = ("sluice", "sluice:1", "vllm", "rust")
KINDS = re.compile(r"sluice(:[1-9][0-9]*|=.+)?|vllm(=[1-9][0-9]*)?|rust")
# What `vllm serve` is; the first is in vLLM for CPUs, too.
API_SERVER = ("vllm.entrypoints.openai.api_server",)
SERVE = ("vllm.entrypoints.cli.main", "serve")

PROMPT_WORDS = 120
PROMPT_TOKENS = 256  # more than they are, with what the chat template adds
SPARE = 1.2
# What must be free at each start; the KV cache has its own size.
MEMORY_SHARE = 0.2
# Of what vLLM compiles, each server its own: they start at the same time.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sluice" / "gpu"


def entry(home: Path, shape: str, streams: int, tokens: int, **env: str) -> Model:
    """An entry of models.yaml: a model of that shape, with room for so many streams and no more."""
    directory = home / "model"
    config = shaped.write(directory, shape)
    # vLLM refuses a cache that the longest request of all would not fit into.
    kv_tokens = streams * (PROMPT_TOKENS + tokens) * SPARE + shaped.CONTEXT_TOKENS
    args: dict[str, Any] = {
        "max-model-len": shaped.CONTEXT_TOKENS,
        "max-num-seqs": streams,
        "load-format": "dummy",
        "worker-extension-cls": "bench.gpu.weights.Extension",
        "gpu-memory-utilization": MEMORY_SHARE,
        "kv-cache-memory-bytes": round(kv_tokens * shaped.kv_bytes_per_token(config)),
    }
    return Model(name="bench", source=str(directory), slots=streams, args=args, env=env)


@contextmanager
def all_up(kinds: Sequence[str], model: Model, home: Path) -> Iterator[list[Stack]]:
    """All of these servers, which load at the same time.

    Raises:
        StackError: one does not start.
    """
    with ExitStack() as up:
        launches = [up.enter_context(_launch(kind, model, home)) for kind in kinds]
        yield [launch.await_ready() for launch in launches]


def _launch(kind: str, model: Model, home: Path) -> AbstractContextManager[Launch]:
    name, _, value = kind.partition("=")
    place = home / re.sub("[^a-z0-9]+", "-", kind.lower())[-40:]
    place.mkdir()
    if name == "rust":
        rust = {"VLLM_USE_RUST_FRONTEND": "1"}
        return _serve(f"{VLLM}, Rust front end", model, place, SERVE, env=rust)
    if name == "vllm" and value:
        serve = (*SERVE, "--api-server-count", value)
        return _serve(f"{VLLM}, {value} API servers", model, place, serve)
    if name == "vllm":
        return _serve(VLLM, model, place, API_SERVER)
    if value:
        checkout = Path(value).resolve()
        label = f"{SLUICE} of {checkout.name}"
        return _sluice(label, model, place, make_copy(place / "source", SLUICE, checkout))
    count = name.partition(":")[2]
    label = f"{SLUICE}, frontends: {count}" if count else SLUICE
    return _sluice(label, model.model_copy(update={"frontends": int(count or 0)}), place)


def _sluice(
    label: str, model: Model, place: Path, source: Path | None = None
) -> AbstractContextManager[Launch]:
    cached = model.model_copy(update={"env": model.env | _cache(label)})
    return launched_sluice(cached, place, source, label)


def _cache(label: str) -> dict[str, str]:
    return {"VLLM_CACHE_ROOT": str(CACHE / re.sub("[^A-Za-z0-9.]+", "-", label))}


@contextmanager
def _serve(
    label: str,
    model: Model,
    home: Path,
    module: Sequence[str],
    env: dict[str, str] | None = None,
) -> Iterator[Launch]:
    """The server of vLLM, with the arguments and environment that Sluice gives the engine."""
    port = free_port()
    command = [sys.executable, "-m", *module, *engine_arguments(model)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    whole = _cache(label) | model.env | os.environ | (env or {})
    with launched(label, command, whole, port, "/health", home) as launch:
        yield launch


def refuse_unknown(kinds: Sequence[str]) -> None:
    """Raises a StackError for a kind of server that does not exist."""
    for kind in kinds:
        if not KINDS.fullmatch(kind):
            raise StackError(
                f"there is no server {kind!r}: name sluice, sluice:FRONT_ENDS, sluice=CHECKOUT, "
                "vllm, vllm=PROCESSES or rust"
            )
