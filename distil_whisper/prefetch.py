"""Work that is done ahead of its turn by threads, bounded in items and in the memory that its results take."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

ITEMS_AHEAD = 4  # for each thread
BYTES_AHEAD = 256 << 20

Item, Result = TypeVar("Item"), TypeVar("Result")


def prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    size_of: Callable[[Item], int] = lambda item: 0,
) -> Iterator[Result]:
    """`map` in order, some items ahead on that many threads; without threads, plain map.

    size_of says beforehand how many bytes an item and its result will take. What is ahead takes BYTES_AHEAD together
    at most, but one item always is.
    """
    if workers < 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()  # results to come and their sizes
        held = 0
        for item in items:
            size = size_of(item)
            while waiting and (len(waiting) > ITEMS_AHEAD * workers or held + size > BYTES_AHEAD):
                held -= waiting[0][1]
                yield waiting.popleft()[0].result()
            waiting.append((pool.submit(function, item), size))
            held += size
            del item  # the caller's by now: what it takes must not stay until the next one
        while waiting:
            yield waiting.popleft()[0].result()
