"""How fast this machine reads memory with all its threads: the limit of decoding for one stream.

A token of one stream reads every weight once, so tokens per second cannot pass bandwidth / bytes of weights.
"""

from __future__ import annotations

import threading
import time

import numpy as np

from serve.machine import cpu_quota

BYTES_PER_THREAD = 256 << 20  # well beyond any cache
REPETITIONS = 8


def read_bandwidth(threads: int = 0) -> float:
    """Bytes per second, the best of several runs. Maximum, unlike a sum, is limited by memory alone in numpy."""
    arrays = [np.ones(BYTES_PER_THREAD // 4, np.int32) for _ in range(threads or cpu_quota()[0])]
    best = 0.0
    for _ in range(REPETITIONS):
        readers = [threading.Thread(target=np.max, args=(array,)) for array in arrays]
        started = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best = max(best, sum(array.nbytes for array in arrays) / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    print(f"{read_bandwidth() / 1e9:.1f} GB/s")
