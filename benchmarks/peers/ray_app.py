"""Ray Serve: a proxy, and replicas that hold a model.

Its documentation advises replicas for each core, `max_ongoing_requests` above its default of 5,
no access log, blocking work in threads, and for throughput HAProxy in place of its own proxy with
`RAY_SERVE_THROUGHPUT_OPTIMIZED` (both from Ray 2.56). The dashboard is off. Workers run at the
niceness of everybody else instead of 15, which they would have by default, and the proxy may take
longer to start on a busy machine; `peer_servers.py` sets both. Replicas ask Ray for half a core
each, for it would keep whole ones from its own actors; it limits nothing.
"""

import asyncio
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import ray
from fastapi import Request, Response
from ray import serve
from ray.serve.schema import LoggingConfig
from recipe import ROUTE, Choice, Recipe

_ONGOING = 100


class Detect:
    def __init__(self, choice: Choice) -> None:
        self.recipe = Recipe(choice)
        self.pool = ThreadPoolExecutor(choice.threads)

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        loop = asyncio.get_running_loop()
        content = await loop.run_in_executor(self.pool, self.recipe.answer, body)
        return Response(content, media_type="application/json")


def main() -> None:
    choice = Choice.read()
    ray.init(include_dashboard=False, log_to_driver=False)
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    serve.start(http_options={"host": "127.0.0.1", "port": choice.port}, logging_config=quiet)
    deployment = serve.deployment(
        num_replicas=choice.workers,
        max_ongoing_requests=_ONGOING,
        ray_actor_options={"num_cpus": 0.5},
        logging_config=quiet,
    )(Detect)
    serve.run(deployment.bind(choice), name="peer", route_prefix=ROUTE)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
    sys.exit(0)


if __name__ == "__main__":
    main()
