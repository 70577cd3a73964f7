"""How much of the bare runtime is left behind HTTP, and what a request costs beside it.

    python benchmarks/service_efficiency.py                     # bundled model, drawn pictures
    python benchmarks/service_efficiency.py --pictures FOLDER   # your own JPEGs

Alternates, in one run, between a bare loop (decode, letterbox, session; the same threads) and the
service under 16 closed-loop clients; then does the same with a near-free network, where the
difference in CPU time is the service's own cost; then sends 5,000 requests and watches memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from near_free_model import write_near_free_model
from serving import Running, run_script, served

from service.artifact import scan_repository
from service.samples import draw_smear
from service.settings import bundled_models

CLIENTS = 16
MEMORY_REQUESTS = 5_000
MEMORY_WARM = 500


def compare(
    server: Running, model: Path, pictures: Path, *, rounds: int, seconds: float
) -> dict[str, float]:
    """Alternate bare loop and service; medians over the rounds."""
    ratios, costs, rows = [], [], []
    for number in range(1, rounds + 1):
        bare = run_script("bare_loop.py", model, pictures, "--seconds", seconds)
        before = server.cpu_seconds()
        load = run_script(
            "load.py", server.url, pictures, "--clients", CLIENTS, "--seconds", seconds
        )
        cpu_ms = 1e3 * (server.cpu_seconds() - before) / load["requests"]
        if set(load["statuses"]) != {"200"}:
            raise SystemExit(f"not every answer was 200: {load['statuses']}")
        ratios.append(load["per_second"] / bare["per_second"])
        costs.append(cpu_ms - bare["cpu_ms"])
        rows.append((bare, load, cpu_ms))
        print(
            f"  round {number}: bare {bare['per_second']:7.1f}/s ({bare['cpu_ms']:6.2f} core-ms)"
            f"   HTTP {load['per_second']:7.1f}/s ({cpu_ms:6.2f} core-ms)"
            f"   ratio {ratios[-1]:.3f}   p50 {load['p50_ms']:.0f} ms, p99 {load['p99_ms']:.0f} ms"
            f"   client {load['client_cpu_ms']:.2f} core-ms",
            flush=True,
        )
    return {"ratio": statistics.median(ratios), "extra_cpu_ms": statistics.median(costs)}


def watch_memory(server: Running, pictures: Path) -> None:
    """Resident memory over 5,000 requests."""
    for done, count in (
        (MEMORY_WARM, MEMORY_WARM),
        (MEMORY_REQUESTS, MEMORY_REQUESTS - MEMORY_WARM),
    ):
        run_script(
            "load.py",
            server.url,
            pictures,
            "--clients",
            CLIENTS,
            "--seconds",
            3600,
            "--limit",
            count,
        )
        print(f"  resident after {done:5d} requests: {server.resident():.1f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="repository folder; default: the bundled one")
    parser.add_argument("--pictures", type=Path, help="folder of JPEGs; default: drawn 640x480")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--no-memory", action="store_true", help="leave out the 5,000 requests")
    arguments = parser.parse_args()
    repository = arguments.model or bundled_models()
    with tempfile.TemporaryDirectory() as scratch:
        pictures = arguments.pictures or _draw(Path(scratch) / "pictures")
        options = {"rounds": arguments.rounds, "seconds": arguments.seconds}
        model = scan_repository(repository)[-1].path
        print(f"{model.parent.parent.name}, {CLIENTS} clients")
        with served(repository) as server:
            real = compare(server, model, pictures, **options)
            if not arguments.no_memory:
                watch_memory(server, pictures)
        free = write_near_free_model(Path(scratch) / "models")
        print(f"near-free network, {CLIENTS} clients")
        with served(Path(scratch) / "models") as server:
            light = compare(server, free, pictures, **options)
    print(f"pictures/s through HTTP over bare loop (median): {real['ratio']:.3f}")
    print(
        "server CPU beyond decode and inference, near-free network (median): "
        f"{light['extra_cpu_ms']:.2f} core-ms per request"
    )


def _draw(folder: Path) -> Path:
    folder.mkdir()
    for seed in range(20):
        picture, _ = draw_smear(seed)
        picture.save(folder / f"{seed:02d}.jpg", quality=90)
    return folder


if __name__ == "__main__":
    main()
