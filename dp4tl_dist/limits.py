"""Above these no number is meant: products of them stay within 64 bits, and each within a float of 32."""

MOST = 10**9
MAX_SIDE = 1 << 14
"""Of an image that a network sees, in pixels."""
MAX_WORKERS = 1 << 10
"""Threads, or processes, that decode or encode for one rank."""
MAX_RANKS = 10_000
MAX_RATE, MAX_DECAY = 1e30, 1e6
"""Far beyond what diverges; their product, which AdamW takes, is a float of 32 bits."""
MAX_WAIT_S = 1_000_000
"""The kernel takes waits in milliseconds, as a number of 32 bits."""
MAX_MASKS = 100_000
"""Small models of one study."""
