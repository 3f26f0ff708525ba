"""Blocks of cached positions: how many positions attention reads in one turn of its loop.

The decoder runs these blocks and the cost model prices them. Imports no JAX.
"""

BLOCK = 512
"""Cached positions per block in prefill, four times as many in decode, where scores are few and every block costs a TPU
some 5 us; up to twice as many are done in one piece."""


def block_size(length: int) -> int:
    """Cached positions per block for `length` new tokens a sequence."""
    return BLOCK if length > 1 else 4 * BLOCK


def n_turns(start: int, length: int) -> int:
    """Turns of the loop over blocks of positions: of tokens `start`..`start + length - 1` over a longer cache.

    The compiled program does not tell it, because it depends on where the sequences are.
    """
    return (start + length - 1) // block_size(length)
