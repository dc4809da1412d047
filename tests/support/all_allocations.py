"""Counts numpy's bytes together with torch's, for code that uses both."""

import tracemalloc

from support.allocations import Allocations


class AllAllocations(Allocations):
    """`Allocations`, and what numpy and Python allocate besides.

    Attributes:
        total_peak: Most bytes of all of them that were alive at one time; never stated too low.
    """

    def __enter__(self):
        tracemalloc.start()
        self.total_peak = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._note()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._note()
        return result

    def _note(self) -> None:
        """What torch holds now and the most that numpy held since the last operation of torch."""
        self.total_peak = max(self.total_peak, self._live_bytes + tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()

    def __exit__(self, *error):
        self._note()
        tracemalloc.stop()
        return super().__exit__(*error)
