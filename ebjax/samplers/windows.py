"""The schedule of a warm-up: what is adapted, and from which draws, at each step.

    | first, fast | slow | slow slow | slow slow slow slow | last, fast |

Carpenter et al., "Stan: a probabilistic programming language", Journal of Statistical Software 76
(2017); the windows are described in the reference manual of Stan.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["MANY_CHAINS", "Windows", "default_windows", "warmup_windows"]

# So many chains know a covariance after a few steps.
MANY_CHAINS = 10


class Windows(NamedTuple):
    """What happens at each step of the warm-up, each [T] bool.

    Attributes:
      is_start: a stretch begins: the step size is searched anew and dual averaging restarts.
      is_slow: the position is counted for the metric.
      is_end: after the step the metric is made from what was counted.
    """

    is_start: np.ndarray
    is_slow: np.ndarray
    is_end: np.ndarray


def warmup_windows(
    num_steps: int, *, num_first: int = 75, num_last: int = 50, num_base: int = 25
) -> Windows:
    """Stan's schedule: a fast stretch, slow windows that double, a fast stretch.

    The last slow window takes what the next one would not fit into. Where the three do not fit
    into ``num_steps`` they become 15 %, 10 % and one window of the rest.

    Args:
      num_steps: T.
      num_first: steps before the first window.
      num_last: steps after the last window.
      num_base: steps of the first window.

    Returns:
      ``Windows``, on the host. Fewer than 20 steps have no window.

    >>> windows = warmup_windows(1000)
    >>> np.flatnonzero(windows.is_end).tolist()
    [99, 149, 249, 449, 949]
    """
    is_start, is_slow, is_end = np.zeros((3, num_steps), bool)
    is_start[:1] = True
    if num_steps < 20:
        return Windows(is_start, is_slow, is_end)
    if num_first + num_base + num_last > num_steps:
        num_first, num_last = int(0.15 * num_steps), int(0.1 * num_steps)
        num_base = num_steps - num_first - num_last
    start, end, size = num_first, num_steps - num_last, num_base
    is_slow[start:end] = True
    while start < end:
        stop = start + size
        if stop + 2 * size > end:
            stop = end
        is_end[stop - 1] = True
        is_start[stop] = True
        start, size = stop, 2 * size
    return Windows(is_start, is_slow, is_end)


def default_windows(num_steps: int, num_chains: int) -> Windows:
    """Stan's schedule, or a faster one for chains that share their adaptation and are many."""
    if num_chains < MANY_CHAINS:
        return warmup_windows(num_steps)
    return warmup_windows(
        num_steps,
        num_first=min(75, max(5, round(0.1 * num_steps))),
        num_last=min(50, max(10, round(0.2 * num_steps))),
        num_base=max(5, 100 // num_chains),
    )
