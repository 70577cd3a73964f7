"""Training steps of the recipe `light` on the CPU, beside plain torch.

    python benchmarks/training_speed.py
    python benchmarks/training_speed.py --canvas 320x320 --threads 1

In turns within one run, each in a process of its own: the step as `retinaserve train` takes it,
and the same network as plain torch computes it, which returns freed memory to the kernel and passes
over the activations for each frozen norm. Then both gradients on the same images, in float32. Needs
the training side.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import Final

import torch
from report import Report, add_options
from torch import Tensor, nn

from model_export.commands.export import parse_canvas
from model_export.commands.options import DEFAULT_RECIPE
from model_export.config import TrainConfig, load_config
from model_export.retinanet import backbones
from model_export.retinanet.model import RetinaNet, freeze_norms
from model_export.training.speed import noise_step
from service.imaging.canvas import Size
from service.system.memory import keep_freed_memory

WAYS: Final = ("retinaserve", "plain torch")
CLASSES: Final = 31


def plain_conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """The convolution, then the norm."""
    normed: Tensor = norm(conv(x))
    return normed


def network_of(config: TrainConfig) -> RetinaNet:
    """The same random network each time, with frozen norms."""
    torch.manual_seed(0)
    network = RetinaNet(config.model, classes=CLASSES)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.train()
    freeze_norms(network.backbone.modules())
    return network


def child(way: str, config: TrainConfig, canvas: Size, steps: int) -> None:
    """Print images a second, and images for each second of a core."""
    if way == WAYS[0]:
        keep_freed_memory(activations=True)
    else:
        backbones.conv_norm = plain_conv_norm
    network = network_of(config)
    for _ in range(2):
        noise_step(network, config, canvas, config.batch_size)
    started, used = time.perf_counter(), time.process_time()
    for _ in range(steps):
        network.zero_grad()
        noise_step(network, config, canvas, config.batch_size)
    images = steps * config.batch_size
    print(images / (time.perf_counter() - started), images / (time.process_time() - used))


def gradient_difference(config: TrainConfig, canvas: Size) -> float:
    """Difference of the gradient of all weights between both ways, in float32, over its size."""
    found = []
    ours = backbones.conv_norm
    for conv_norm in (ours, plain_conv_norm):
        backbones.conv_norm = conv_norm
        network = network_of(config.model_copy(update={"precision": "32"}))
        torch.manual_seed(1)
        noise_step(network, config.model_copy(update={"precision": "32"}), canvas, 2)
        gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        found.append(torch.cat(gradients))
    backbones.conv_norm = ours
    folded, plain = found
    return float((folded - plain).norm() / plain.norm())


def main() -> None:
    """Measure, print a table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--canvas", default="384x512")
    parser.add_argument("--threads", type=int, help="default: torch's own choice, all cores")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = load_config(DEFAULT_RECIPE, {})
    canvas = parse_canvas(arguments.canvas).largest()
    rounds, steps = (2, 3) if arguments.quick else (arguments.rounds, arguments.steps)
    if arguments.child:
        child(arguments.child, config, canvas, arguments.steps)
        return
    report = Report("training_speed", "Training steps beside plain torch", arguments)
    table = report.table(
        {"round": "d", **{f"{way}, images/s": ".2f" for way in WAYS}, "ratio": ".2f"}
    )
    environment = dict(os.environ)
    if arguments.threads:
        environment["OMP_NUM_THREADS"] = str(arguments.threads)
    ratios, per_core = [], []
    for number in range(rounds):
        speeds = {}
        for way in WAYS if number % 2 else WAYS[::-1]:
            command = [sys.executable, __file__, "--canvas", arguments.canvas]
            command += ["--steps", str(steps), "--child", way]
            answer = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            speeds[way] = [float(value) for value in answer.stdout.split()]
        ours, plain = (speeds[way] for way in WAYS)
        ratios.append(ours[0] / plain[0])
        per_core.append(ours[1] / plain[1])
        table.row(number + 1, ours[0], plain[0], ratios[-1])
    report.figure("images/s over plain torch", ratios, better="higher", bound=1.5)
    report.figure("images for each second of a core over plain torch", per_core, better="higher")
    difference = gradient_difference(config, canvas)
    report.figure("gradient's relative difference", [difference], better="lower", bound=1e-3)
    report.close()


if __name__ == "__main__":
    main()
