"""Pages of the KV cache, and which request holds which.

A page holds a fixed number of consecutive positions of one request. If the layout splits attention's batch over groups
of chips, each group is a part with its own pages, and a request stays in one part. The scheduler decides whether there
is room before a request gets pages here.
"""

from typing import Literal

import numpy as np

Held = Literal["rows", "pages"]
"""`rows`: a request takes all pages that it may need when it starts. `pages`: it takes each page when it reaches it."""


def n_pages(*, rows: int, n_slots: int, page: int, longest: int, held: Held) -> int:
    """Pages of one part for `rows` requests, enough to hold all slots. Arguments: see `Pages`."""
    whole = rows * -(-longest // page)
    # each request may leave most of its last page empty, hence one more page for each
    return whole if held == "rows" else min(whole, n_slots // page + rows)


class Pages:
    """The pages of all parts, numbered from 0 in each part.

    Args:
        parts: groups of chips that attention's batch is split over.
        rows: most requests at once.
        n_slots: most positions that the scheduler reserves at once.
        page: positions in a page.
        longest: most positions of a request.
        held: see `Held`.
    """

    def __init__(self, *, parts: int, rows: int, n_slots: int, page: int, longest: int, held: Held):
        self.page, self.held, self.longest = page, held, longest
        self.per_request = -(-longest // page)
        self.n_pages = n_pages(rows=-(-rows // parts), n_slots=n_slots, page=page, longest=longest, held=held)
        self._free = [list(range(self.n_pages - 1, -1, -1)) for _ in range(parts)]
        self._at: dict[int, tuple[int, np.ndarray, int]] = {}  # request -> part, page table, pages in the table
        self._rows = [0] * parts

    @property
    def in_use(self) -> int:
        """Pages that requests hold, in all parts."""
        return sum(self.n_pages - len(free) for free in self._free)

    def admit(self, request: int) -> None:
        """Puts a request into the part with the fewest requests."""
        part = min(range(len(self._rows)), key=self._rows.__getitem__)
        self._rows[part] += 1
        self._at[request] = (part, np.zeros(self.per_request, np.int32), 0)
        if self.held == "rows":
            self.reach(request, self.longest)

    def reach(self, request: int, positions: int) -> None:
        """Gives a request the pages that it lacks for its first `positions` positions."""
        part, table, n = self._at[request]
        wanted = -(-positions // self.page)
        if n >= wanted:
            return
        free = self._free[part]
        if len(free) < wanted - n:
            raise RuntimeError(f"request {request} needs {wanted - n} pages, but only {len(free)} are free")
        for i in range(n, wanted):
            table[i] = free.pop()
        self._at[request] = (part, table, wanted)

    def of(self, request: int) -> tuple[int, np.ndarray]:
        """A request's part, and its page table [per_request]: page numbers in the order of positions."""
        part, table, _ = self._at[request]
        return part, table

    def release(self, request: int) -> None:
        """Takes back a request's pages."""
        part, table, n = self._at.pop(request)
        self._rows[part] -= 1
        self._free[part].extend(int(p) for p in table[:n][::-1])

    def __contains__(self, request: int) -> bool:
        return request in self._at
