"""BentoML: a class with an API, in worker processes that take threads for methods that block.

Its documentation advises workers for each core and `threads` for what releases the interpreter's
lock. The access log and metrics are off; both cost. "Mounted" is its way to serve a FastAPI
application from the same class: it spares the schema that BentoML otherwise derives anew for each
raw body, at the price of its own limit on threads (it is Starlette's then, 40). Adaptive batching
is not tried: it takes lists in JSON, not a raw body.
"""

import os
import sys
from typing import Annotated

import bentoml
from bentoml.validators import ContentType
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from recipe import ROUTE, Choice, Recipe

_CHOICE = Choice.read()
_app = FastAPI()


class _Api:
    def __init__(self) -> None:
        self.recipe = Recipe(_CHOICE)

    @bentoml.api(route=ROUTE)
    def detect(self, image: bytes, /) -> Annotated[bytes, ContentType("application/json")]:
        return self.recipe.answer(image)


@bentoml.asgi_app(_app)
class _Mounted:
    def __init__(self) -> None:
        self.recipe = Recipe(_CHOICE)

    @_app.post(ROUTE)
    async def detect(self, request: Request) -> Response:
        content = await run_in_threadpool(self.recipe.answer, await request.body())
        return Response(content, media_type="application/json")


Service = bentoml.service(
    name="peer",
    workers=_CHOICE.workers,
    threads=_CHOICE.threads,
    traffic={"timeout": 60},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)(_Mounted if _CHOICE.style == "mounted" else _Api)


def main() -> None:
    command = [sys.executable, "-m", "bentoml", "serve", "bentoml_app:Service"]
    command += ["--host", "127.0.0.1", "--port", str(_CHOICE.port)]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
