"""Progress bars, drawn twice a second on a terminal and every half minute in a log file."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

SECONDS, SECONDS_IN_LOGS = 0.5, 30.0


def progress_bar(items: Iterable | None = None, **options) -> tqdm:
    """A tqdm bar over `items`, or one that its user updates."""
    interval = SECONDS if sys.stderr.isatty() else SECONDS_IN_LOGS
    # tqdm draws a bar that is updated often after `maxinterval` in any case
    return tqdm(items, mininterval=interval, maxinterval=max(10.0, interval), dynamic_ncols=True, **options)
