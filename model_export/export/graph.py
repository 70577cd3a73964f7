"""Writing the model file: one ONNX that holds the whole detector."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import onnx
import torch
from torch import Tensor, nn

from model_export.checkpoints import Checkpoint
from model_export.export.decoding import PIXELS, map_names, surround
from model_export.export.nms import append_selection, declare_inputs, require_inputs
from model_export.retinanet.model import RetinaNet
from service.imaging.canvas import MULTIPLE, Buckets, ShortSide
from service.runtime.artifact import Metadata, Thresholds, set_metadata, write_checksum

OPSET: Final = 18
PRODUCER: Final = "retinaserve"

_NETWORK: Final = "network"
"""What `MapNetwork` calls the network; the exporter keeps the names of its weights."""
_EXAMPLE: Final = (11 * MULTIPLE, 6 * MULTIPLE)
"""Height and width of the canvas that is shown to the exporter."""


class MapNetwork(nn.Module):
    """The part of the file that torch exports."""

    def __init__(self, network: RetinaNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Normalised pixels in, the heads' maps out."""
        return self.network.maps(pixels)


def export(
    checkpoint: Checkpoint,
    output: Path,
    *,
    name: str,
    canvas: Buckets | ShortSide | None = None,
    thresholds: Thresholds | None = None,
    required_inputs: bool = False,
) -> Metadata:
    """Write `output`, and its checksum as `model.sha256` beside it. Returns its metadata.

    `canvas` replaces the checkpoint's own rule. With `required_inputs` no input has a default.
    """
    description = checkpoint.description
    metadata = Metadata(
        name=name,
        classes=description.classes,
        canvas=canvas or description.canvas,
        thresholds=thresholds or Thresholds(),
        provenance=description.provenance,
    )
    model = build(checkpoint.build(), classes=len(description.classes))
    set_metadata(model, metadata)
    if required_inputs:
        require_inputs(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target first: a running service may be watching the folder.
    partial = output.with_name(output.name + ".part")
    onnx.save(model, partial)
    partial.replace(output)
    write_checksum(output)
    return metadata


def replace_weights(path: Path, weights: Mapping[str, Tensor], metadata: Metadata) -> None:
    """Give a float32 file that `export` wrote other weights, by the network's own names."""
    model = onnx.load(path)
    initializers = {each.name: each for each in model.graph.initializer}
    for name, weight in weights.items():
        name_in_file = f"{_NETWORK}.{name}"
        initializers[name_in_file].CopyFrom(
            onnx.numpy_helper.from_array(weight.numpy(), name_in_file)
        )
    set_metadata(model, metadata)
    onnx.save(model, path)
    write_checksum(path)


def build(network: RetinaNet, *, classes: int) -> onnx.ModelProto:
    """Return the model file's graph, without metadata."""
    model = _export_network(network.eval())
    surround(model, network, classes=classes)
    append_selection(model, classes=classes)
    declare_inputs(model)
    # Stack traces of the machine that exported.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.metadata_props[:]
    del model.functions[:]
    model.producer_name = PRODUCER
    onnx.checker.check_model(model, full_check=True)
    return model


def _export_network(network: RetinaNet) -> onnx.ModelProto:
    """From pixels to maps, for canvases of any size.

    Convolutions do not care for the size, and following an open one through them takes the exporter
    most of a minute: it gets a fixed one, and the lengths that it noted are taken away before its
    optimiser, which would make constants of them.
    """
    pixels = torch.zeros((2, 3, *_EXAMPLE))
    quiet = contextlib.redirect_stdout(io.StringIO())
    with torch.no_grad(), warnings.catch_warnings(), quiet:
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            MapNetwork(network),
            (pixels,),
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=[PIXELS],
            output_names=map_names(),
            optimize=False,
            verbose=False,
        )
        assert program is not None
        graph = program.model.graph
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
            if value.shape is not None:
                # The number of dimensions stays: without it no padding is put into a convolution.
                value.shape = type(value.shape)([None] * len(value.shape))
        program.optimize()
    model = program.model_proto
    del model.graph.value_info[:]
    return model
