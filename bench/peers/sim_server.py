"""The simulated engine as a server, for gateways to stand in front of: a process of its own.

`python -m bench.peers.sim_server PORT MODEL`, with MODEL an entry of models.yaml, as JSON.
"""

import sys

import orjson
import uvicorn
import uvloop

from gpu_worker.engines.engine import AsgiApp, Message, Receive, Send
from gpu_worker.engines.sim import open_engine
from tasks.contract.models import Model

STOP_S = 1  # for streams that go on


class SimServer:
    """The engine's endpoints, and those that gateways ask before they send anything."""

    def __init__(self, engine: AsgiApp, model: str) -> None:
        self._engine = engine
        models = {"object": "list", "data": [{"id": model, "object": "model", "owned_by": "sim"}]}
        self._others = {"/health": b"", "/v1/models": orjson.dumps(models)}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        body = self._others.get(scope["path"])
        if body is None:
            await self._engine(scope, receive, send)
            return
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def _serve(port: int, model: Model) -> None:
    async with open_engine(model) as engine:
        config = uvicorn.Config(
            SimServer(engine.app, model.name),
            port=port,
            lifespan="off",
            log_level="warning",
            timeout_graceful_shutdown=STOP_S,
        )
        await uvicorn.Server(config).serve()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), Model.model_validate_json(sys.argv[2])))
