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
from model_export.retinanet.model import RetinaNet
from model_export.retinanet.postprocess import candidates
from model_export.selection import append_selection, declare_inputs
from service.artifact import Metadata, Thresholds, set_metadata, write_checksum
from service.canvas import MULTIPLE, Buckets, ShortSide
from service.detector import INPUTS, SEAM

OPSET: Final = 18
PRODUCER: Final = "retinaserve"

_NETWORK: Final = "network"
"""What `CandidateNetwork` calls the network; the exporter keeps the names of its weights."""


class CandidateNetwork(nn.Module):
    """The part of the file that torch exports: canvases in, candidate boxes out."""

    def __init__(self, network: RetinaNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `candidates`; an image size of 0 stands for the whole canvas."""
        canvas = torch.cat([torch.full((1,), side) for side in images.shape[1:3]])
        sizes = torch.where(image_sizes > 0, image_sizes, canvas)
        return candidates(self.network(images, sizes), sizes)


def export(
    checkpoint: Checkpoint,
    output: Path,
    *,
    name: str,
    canvas: Buckets | ShortSide | None = None,
    thresholds: Thresholds | None = None,
) -> Metadata:
    """Write `output`, and its checksum as `model.sha256` beside it. Returns its metadata.

    `canvas` replaces the checkpoint's own rule.
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
    """The model file's graph, without metadata."""
    model = _export_candidates(CandidateNetwork(network.eval()))
    append_selection(model, classes=classes)
    declare_inputs(model)
    # Shapes noted while tracing assume that `image_sizes` has the batch's length, but its default
    # has length 1 and is broadcast; onnxruntime infers what it needs by itself.
    del model.graph.value_info[:]
    # Stack traces of the machine that exported.
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.metadata_props[:]
    del model.functions[:]
    model.producer_name = PRODUCER
    onnx.checker.check_model(model, full_check=True)
    return model


def _export_candidates(network: CandidateNetwork) -> onnx.ModelProto:
    # Sides unlike each other and, on every pyramid level, unlike 1: the exporter would take such
    # coincidences for constants.
    batch, rows, columns = 2, 11, 6
    images = torch.zeros((batch, rows * MULTIPLE, columns * MULTIPLE, 3), dtype=torch.uint8)
    sizes = torch.tensor([[rows * MULTIPLE, columns * MULTIPLE]] * batch)
    dim = torch.export.Dim
    shapes = {
        "images": {
            0: dim("batch", min=1),
            1: MULTIPLE * dim("rows", min=1),
            2: MULTIPLE * dim("columns", min=1),
        },
        "image_sizes": {0: dim("batch", min=1)},
    }
    quiet = contextlib.redirect_stdout(io.StringIO())
    with torch.no_grad(), warnings.catch_warnings(), quiet:
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            network,
            (images, sizes),
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=list(INPUTS[:2]),
            output_names=list(SEAM),
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    return program.model_proto
