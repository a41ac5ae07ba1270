"""A spike of the loss: one step far above those before it. The black box writes it down, the report counts it.

Not the `spike` of a recipe's alarm: that compares with the mean of a window, by an absolute number of nats that the
recipe names, and hence sees a loss that climbs over many steps too, none of which need be a spike.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

SIGMAS = 6.0  # robust deviations above the usual loss
WINDOW = 50  # losses, spikes left out, that say what is usual
FEWEST = 10  # losses before a spike can be told
RECENT = 5  # losses whose median is the usual one
SPREAD_OF_MAD = 1.4826  # of a normal distribution: standard deviation over median absolute deviation
LEAST_LEAP = 0.1  # of the usual loss: a calm run must not call ripples spikes


def spike_limit(history: Sequence[float], sigmas: float = SIGMAS) -> float | None:
    """Loss above which a step is a spike: median of the last five + max(sigmas * robust deviation, 10 %).

    The deviation is that of differences between neighbours, less their median, so that a falling loss does not widen
    it.

    Args:
        history: finite losses of the steps before, oldest first, spikes left out; the last WINDOW or so.

    Returns:
        nats; None with too few losses.
    """
    if len(history) < FEWEST:
        return None
    usual = statistics.median(history[-RECENT:])
    moves = [after - before for before, after in itertools.pairwise(history)]
    drift = statistics.median(moves)
    spread = SPREAD_OF_MAD * statistics.median(abs(move - drift) for move in moves) / math.sqrt(2)
    return usual + max(sigmas * spread, LEAST_LEAP * abs(usual))


def count_spikes(losses: Sequence[float]) -> int:
    """Spikes of a run; steps in a row count once.

    Args:
        losses: finite losses of its steps, in order.
    """
    history: list[float] = []
    count, last = 0, False
    for loss in losses:
        limit = spike_limit(history)
        spiking = limit is not None and loss > limit
        count += spiking and not last
        if not spiking:
            history = [*history[-WINDOW + 1 :], loss]
        last = spiking
    return count
