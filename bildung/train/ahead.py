"""The next batch is made by a thread while the model works on this one. The order is the same, and so are the errors.

    batches     |0|1|  |2|  |3|  |4|
    training      |0  |1   |2   |3   |

A batch is a function of its number (data/batches.py), so it does not matter who asks for it, or when.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

B = TypeVar("B")


def ahead(batch_at: Callable[[int], B], numbers: Iterable[int]) -> Generator[B, None, None]:
    """The batches of these numbers in this order, each begun when the one before is handed out. What `batch_at` raises
    is raised where its batch was due. Close it (contextlib.closing) to be rid of the thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as worker:
        coming = None
        for number in numbers:
            following = worker.submit(batch_at, number)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()
