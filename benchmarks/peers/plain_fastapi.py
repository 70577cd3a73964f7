"""Plain FastAPI: the body is read on the event loop, the work is done in a thread pool.

uvicorn with uvloop and httptools, no access log, a body as raw bytes and an answer as ready JSON,
as FastAPI's and uvicorn's documentation advise.
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
