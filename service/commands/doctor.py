"""`retinaserve doctor`: try out which devices and models work."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from time import perf_counter

import click
import onnxruntime as ort

from service.errors import DeviceError, RetinaserveError
from service.runtime.artifact import Entry, read_artifact, scan_repository
from service.runtime.devices import (
    CUDA_PROVIDER,
    Device,
    Hardware,
    nvidia_driver,
    open_detector,
    preload_libraries,
    prove,
    resolve_for,
)
from service.settings import Settings, load_settings
from service.system.cpus import cpu_count


def run(device: str | None) -> None:
    """Print the findings. Raises DeviceError at the end if the device is not usable."""
    settings = load_settings(device=device)
    for line in _machine():
        click.echo(line)
    failure: DeviceError | None = None
    hardware = Hardware((Device("cpu"),))
    try:
        hardware = resolve_for(settings)
    except DeviceError as error:
        failure = error
        click.echo(_row("device", f"{settings.device}: NOT usable"))
    else:
        fell_back = f" ({hardware.fallback})" if hardware.fallback else ""
        click.echo(_row("device", f"{settings.device}: {hardware.name} works{fell_back}"))
        for line in _models(settings, hardware.devices[0]):
            click.echo(line)
    if failure is not None:
        raise failure


def _machine() -> Iterator[str]:
    yield _row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield _row("CPUs", f"{cpu_count()} to use (affinity and quota) of {os.cpu_count()}")
    yield _row("onnxruntime", f"{ort.__version__}: {', '.join(ort.get_available_providers())}")
    driver = nvidia_driver()
    yield _row("NVIDIA driver", driver or "none found")
    yield from (_row("GPU", name) for name in gpus())
    if driver and CUDA_PROVIDER in ort.get_available_providers():
        preload_libraries()
        problem = prove(Device("cuda", 0))
        yield _row("CUDA session", "works on cuda:0" if problem is None else f"no: {problem}")


def gpus() -> list[str]:
    """Return name, memory and driver of each GPU, as nvidia-smi writes them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ["nvidia-smi is there but does not answer"]
    return done.stdout.strip().splitlines()


def _models(settings: Settings, device: Device) -> Iterator[str]:
    try:
        entries = scan_repository(settings.models_dir)
    except RetinaserveError as error:
        yield _row("models", str(error))
        return
    yield _row("models", str(settings.models_dir))
    for entry in entries:
        yield _row(f"  {entry.name}@{entry.version}", _try_model(entry, device))


def _try_model(entry: Entry, device: Device) -> str:
    try:
        started = perf_counter()
        detector = open_detector(read_artifact(entry.path), device)
        rule = detector.metadata.canvas
        canvas = next(iter(rule.all_canvases()), rule.largest())
        detector.prove(canvas)
        loaded = perf_counter()
        detector.warm(canvas)
        seconds = perf_counter() - loaded
    except RetinaserveError as error:
        return f"NOT usable: {error}"
    return (
        f"works on {device.name}: loaded in {loaded - started:.1f} s, "
        f"{seconds * 1e3:.1f} ms for a {canvas.height}x{canvas.width} canvas"
    )


def _row(name: str, text: str) -> str:
    return f"{name:<16} {text}"
