"""Plain FastAPI: the event loop reads bodies, a pool of threads decodes and runs the network.

What its documentation and uvicorn's advise: blocking work in threads, uvloop and httptools, no
access log, the body as raw bytes and the answer as ready JSON, past schemas. The choice is between
one process with threads, for onnxruntime and the decoder release the interpreter's lock, and a
process for each core (`--workers`). Two processes share the socket, not the queue: each works off
the connections that it happened to accept, which shows in the 99th percentile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request, Response
from recipe import ROUTE, Choice, Recipe


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    choice = Choice.read()
    app.state.recipe = Recipe(choice)
    with ThreadPoolExecutor(choice.threads) as app.state.pool:
        yield


app = FastAPI(lifespan=lifespan)


@app.post(ROUTE)
async def detect(request: Request) -> Response:
    body, state = await request.body(), request.app.state
    loop = asyncio.get_running_loop()
    content = await loop.run_in_executor(state.pool, state.recipe.answer, body)
    return Response(content, media_type="application/json")


def main() -> None:
    choice = Choice.read()
    uvicorn.run(
        "plain_fastapi:app",
        host="127.0.0.1",
        port=choice.port,
        workers=choice.workers,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
