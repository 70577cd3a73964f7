"""LitServe: processes that answer HTTP, processes that hold a model, queues between them.

Its documentation advises several workers for each device, batches, and the ZeroMQ queue
(`fast_queue`) for high rates. A worker does one request, or one batch, at a time, so there is one
worker for each core with a session of one thread. "One front" leaves the cores to the workers; its
default is as many HTTP processes as workers. The body comes raw, which takes an annotation: by
itself it parses JSON. Batches hold images of one canvas back for each other and gain nothing on a
CPU with a real network; they are tried because they save the near-free one some calls.
"""

from typing import Annotated

import litserve
from fastapi import Body, Response
from recipe import ROUTE, Choice, Recipe


class Detect(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.recipe = Recipe(Choice.read())

    # By its annotation LitServe takes the body as it is; without one it would parse JSON.
    def decode_request(self, request: Annotated[bytes, Body()]) -> bytes:
        return request

    def predict(self, image: bytes) -> bytes:
        return self.recipe.answer(image)

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/json")


class DetectBatch(Detect):
    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, images: list[bytes]) -> list[bytes]:
        return self.recipe.answers(images)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output


def main() -> None:
    choice = Choice.read()
    if choice.batch > 1:
        api = DetectBatch(api_path=ROUTE, max_batch_size=choice.batch, batch_timeout=0.0)
    else:
        api = Detect(api_path=ROUTE)
    server = litserve.LitServer(
        api,
        accelerator="cpu",
        workers_per_device=choice.workers,
        fast_queue="zmq" in choice.style,
    )
    server.run(
        host="127.0.0.1",
        port=choice.port,
        num_api_servers=1 if "one front" in choice.style else None,
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )


if __name__ == "__main__":
    main()
