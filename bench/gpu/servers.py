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
DEFAULT = ("sluice", "vllm", "rust", "vllm=4")
KINDS = re.compile(r"(sluice|vllm|rust)|sluice=.+|vllm=[1-9][0-9]*")

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
    kv_tokens = streams * (PROMPT_TOKENS + tokens) * SPARE
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
    if name == "sluice":
        source = make_copy(place / "source", SLUICE, Path(value)) if value else None
        label = f"{SLUICE} of {Path(value).resolve().name}" if value else SLUICE
        cached = model.model_copy(update={"env": model.env | _cache(label)})
        return launched_sluice(cached, place, source, label)
    if name == "rust":
        rust = {"VLLM_USE_RUST_FRONTEND": "1"}
        return _serve(f"{VLLM}, Rust front end", model, place, env=rust)
    several = ("--api-server-count", value) if value else ()
    return _serve(f"{VLLM}, {value} API servers" if value else VLLM, model, place, several)


def _cache(label: str) -> dict[str, str]:
    return {"VLLM_CACHE_ROOT": str(CACHE / re.sub("[^A-Za-z0-9.]+", "-", label))}


@contextmanager
def _serve(
    label: str,
    model: Model,
    home: Path,
    more: Sequence[str] = (),
    env: dict[str, str] | None = None,
) -> Iterator[Launch]:
    """`vllm serve`, with the arguments and environment that Sluice gives the engine."""
    port = free_port()
    _, source, *arguments = engine_arguments(model)  # the model comes without its flag
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", source, *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), *more]
    whole = _cache(label) | model.env | os.environ | (env or {})
    with launched(label, command, whole, port, "/health", home) as launch:
        yield launch


def refuse_unknown(kinds: Sequence[str]) -> None:
    """Raises a StackError for a kind of server that does not exist."""
    for kind in kinds:
        if not KINDS.fullmatch(kind):
            raise StackError(
                f"there is no server {kind!r}: name sluice, sluice=CHECKOUT, vllm, vllm=PROCESSES "
                "or rust"
            )
