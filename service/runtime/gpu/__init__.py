"""How a model file runs on a GPU: split at its seam, as CUDA graphs, in buffers that stay."""
