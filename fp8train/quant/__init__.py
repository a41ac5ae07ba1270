"""FP8 numbers: formats, blocks, scales, and the reference that defines them."""
