"""Anchor boxes: nine (by default) per cell of every pyramid level.

Boxes are x1, y1, x2, y2 in canvas pixels, the origin at the canvas's top-left corner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

LEVELS = (3, 4, 5, 6, 7)
"""Pyramid levels P3 to P7; level l has stride 2**l."""

_OCTAVES = (1.0, 2.0 ** (1 / 3), 2.0 ** (2 / 3))

# By level, side of the canvas in pixels and cells along that side.
_STRIDES: Final[Mapping[str, Callable[[int, int, int], int]]] = {
    "level": lambda level, side, cells: 2**level,
    "canvas": lambda level, side, cells: side // cells,
}


class AnchorConfig(BaseModel):
    """The anchors of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sizes: tuple[tuple[float, ...], ...] = tuple(
        tuple(round(4 * 2**level * octave, 4) for octave in _OCTAVES) for level in LEVELS
    )
    """Square roots of the anchor areas in pixels, for P3 to P7 (Focal Loss, section 4)."""
    ratios: tuple[float, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1)
    """Height over width."""
    offset: float = 0.5
    """Where in its cell an anchor is centred, in strides: 0.5 is the cell's middle."""
    stride: Literal["level", "canvas"] = "level"
    """Distance of neighbouring cells: 2**level, or the canvas's side // the number of cells.

    The two differ where a level does not divide the canvas: at 800x1344, P6 has 13x21 cells, 64 or
    61x64 pixels apart. torchvision has the latter.
    """
    round_corners: bool = False
    """Corners of an anchor, relative to its centre, are whole pixels; halves go to the even one."""

    @model_validator(mode="after")
    def _check(self) -> AnchorConfig:
        counts = {len(sizes) for sizes in self.sizes}
        if len(self.sizes) != len(LEVELS) or len(counts) != 1 or 0 in counts:
            raise ValueError(
                "anchors.sizes needs five lists (P3 to P7) of one length, got "
                f"{[list(sizes) for sizes in self.sizes]}"
            )
        if min(min(sizes) for sizes in self.sizes) <= 0 or min(self.ratios) <= 0:
            raise ValueError("anchors.sizes and anchors.ratios must be positive")
        return self

    @property
    def per_cell(self) -> int:
        """Anchors per cell."""
        return len(self.sizes[0]) * len(self.ratios)


def base_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """(A, 4) boxes centred at the origin, ratio-major, then size.

    >>> base_anchors([32.0], [1.0])
    tensor([[-16., -16.,  16.,  16.]])
    """
    size = torch.tensor(sizes, dtype=torch.float64)
    root = torch.tensor(ratios, dtype=torch.float64).sqrt()
    heights = (root[:, None] * size[None, :]).flatten()
    widths = (size[None, :] / root[:, None]).flatten()
    return (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).float()


def level_base_anchors(config: AnchorConfig) -> list[Tensor]:
    """(A, 4) boxes centred at the origin for each of P3 to P7."""
    exact = [base_anchors(sizes, config.ratios) for sizes in config.sizes]
    return [base.round() for base in exact] if config.round_corners else exact


def cell_strides(
    rule: str, *, level: int, canvas: tuple[int, int], grid: tuple[int, int]
) -> tuple[int, int]:
    """(y, x) pixels from cell to cell; `canvas` and `grid` are (height, width).

    >>> cell_strides("canvas", level=6, canvas=(800, 1344), grid=(13, 21))
    (61, 64)
    """
    stride = _STRIDES[rule]
    return stride(level, canvas[0], grid[0]), stride(level, canvas[1], grid[1])


def grid_anchors(
    base: Tensor, *, height: int, width: int, stride: tuple[int, int], offset: float
) -> Tensor:
    """(height * width * A, 4) anchors of one level, row by row, cell by cell.

    `stride` is (y, x) in pixels.
    """
    ys = (torch.arange(height, device=base.device, dtype=base.dtype) + offset) * stride[0]
    xs = (torch.arange(width, device=base.device, dtype=base.dtype) + offset) * stride[1]
    grid_y, grid_x = torch.meshgrid(ys, xs, indexing="ij")
    centres = torch.stack([grid_x, grid_y, grid_x, grid_y], dim=-1)
    return (centres[:, :, None, :] + base).reshape(-1, 4)


def level_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """Grid (height, width) of P3 to P7 for a canvas whose sides are multiples of 32."""
    return [(-(-height // 2**level), -(-width // 2**level)) for level in LEVELS]


def level_anchors(config: AnchorConfig, height: int, width: int) -> list[Tensor]:
    """(cells, A, 4) anchors of a canvas for each of P3 to P7."""
    return [
        grid_anchors(
            base,
            height=grid[0],
            width=grid[1],
            stride=cell_strides(config.stride, level=level, canvas=(height, width), grid=grid),
            offset=config.offset,
        ).view(-1, config.per_cell, 4)
        for level, base, grid in zip(
            LEVELS, level_base_anchors(config), level_shapes(height, width), strict=True
        )
    ]


def canvas_anchors(config: AnchorConfig, height: int, width: int) -> Tensor:
    """(N, 4) anchors of a whole canvas, P3 first."""
    return torch.cat([level.flatten(0, 1) for level in level_anchors(config, height, width)])
