"""Simulate how the engine shares out a step, for more threads than the machine at hand has.

    python asv_benchmarks/threads_model.py

As in _core.pyx, each thread takes the chunks of its own share, then those that are left of the
others', and the step ends when all have come. For each number of KiB that a thread more may stand
for, it prints by how much a step takes longer at most than with the best number of threads.
"""

from __future__ import annotations

import heapq

CORES = 16
SIZES = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384)

# Microseconds, of one thread, for a KiB of params in its caches: of docs/performance.md.
WORK = 0.13

# The KiB of params that a thread more may stand for.
KIBS = (96, 192, 384, 768, 1536)

# Microseconds until another thread has come, in four states and machines, and what it costs the
# first thread to call each of them.
CASES = {
    "the others are awake": (1.0, 0.1),
    "they wake in 30 us": (30.0, 2.0),
    "in 70 us": (70.0, 5.0),
    "in 150 us": (150.0, 5.0),
}


def step(size: int, n: int, latency: float, waking: float) -> float:
    """Return the microseconds of a step of so many KiB by n threads, all but one of which wait."""
    if n == 1:
        return size * WORK
    per_share = size // n // 1024 + 1
    chunk = size / n / per_share * WORK
    left = [per_share] * n
    comes = [waking * (n - 1), *(waking * i + latency for i in range(1, n))]
    ready = [(time, i) for i, time in enumerate(comes)]
    heapq.heapify(ready)
    end = 0.0
    while ready:
        time, i = heapq.heappop(ready)
        share = next(((i + k) % n for k in range(n) if left[(i + k) % n]), None)
        if share is None:
            end = max(end, time)
        else:
            left[share] -= 1
            heapq.heappush(ready, (time + chunk, i))
    return end


def loss(kib: int, latency: float, waking: float) -> tuple[float, int]:
    """Return the most that is lost by a thread for so many KiB, and at which size."""
    losses = []
    for size in SIZES:
        times = [step(size, n, latency, waking) for n in range(1, CORES + 1)]
        losses.append((times[min(max(size // kib, 1), CORES) - 1] - min(times), size))
    return max(losses)


def main() -> None:
    """Print the table."""
    print(f"us lost at most, of {CORES} threads | " + " | ".join(CASES))
    for kib in KIBS:
        cells = ("{:.0f} at {:,} KiB".format(*loss(kib, *case)) for case in CASES.values())
        print(f"a thread for {kib} KiB | " + " | ".join(cells))


if __name__ == "__main__":
    main()
