"""Blocks of cached positions: attention reads one block in each turn of its loop.

The decoder runs these blocks and the cost model prices them. Imports no JAX.
"""

BLOCK = 512
"""Cached positions per block in prefill. Decode has four times as many, because its scores are few and each block costs
a TPU about 5 us. Up to two blocks are computed in one piece, without a loop."""


def block_size(length: int) -> int:
    """Cached positions per block in a pass with `length` new tokens per sequence."""
    return BLOCK if length > 1 else 4 * BLOCK


def n_turns(start: int, length: int) -> int:
    """Turns of the loop over blocks when tokens `start`..`start + length - 1` attend to a longer cache.

    The number depends on the sequences' positions, so it cannot be read from a compiled program.
    """
    return (start + length - 1) // block_size(length)
