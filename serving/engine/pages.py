"""Pages of the KV cache: who holds which.

A page holds so many consecutive positions of one request. Where the layout splits attention's rows over chips, each
part has pages of its own, and a request lives in one part. Decides where a request's pages are; the scheduler has
decided before that there is room.
"""

from typing import Literal

import numpy as np

Held = Literal["rows", "pages"]
"""A request takes all pages that it could ever need when it starts (a row), or each when its first position comes."""


def n_pages(*, rows: int, n_slots: int, page: int, longest: int, held: Held) -> int:
    """Pages of a part with so many rows; it may have to hold all slots. See `Pages` for the rest."""
    whole = rows * -(-longest // page)
    # each request may leave most of its last page empty
    return whole if held == "rows" else min(whole, n_slots // page + rows)


class Pages:
    """Pages of `parts` parts, numbered 0.. in each.

    Args:
        parts: see above.
        rows: requests that are live at once, at most.
        n_slots: positions that the scheduler reserves at once, at most.
        page: positions in a page.
        longest: positions of a request, at most.
        held: see `Held`.
    """

    def __init__(self, *, parts: int, rows: int, n_slots: int, page: int, longest: int, held: Held):
        self.page, self.held, self.longest = page, held, longest
        self.per_request = -(-longest // page)
        self.n_pages = n_pages(rows=-(-rows // parts), n_slots=n_slots, page=page, longest=longest, held=held)
        self._free = [list(range(self.n_pages - 1, -1, -1)) for _ in range(parts)]
        self._at: dict[int, tuple[int, np.ndarray, int]] = {}  # request -> part, its table, pages in it
        self._rows = [0] * parts

    @property
    def in_use(self) -> int:
        """Pages that requests hold, in all parts."""
        return sum(self.n_pages - len(free) for free in self._free)

    def admit(self, request: int) -> None:
        """A row for a request, in the part that has the fewest."""
        part = min(range(len(self._rows)), key=self._rows.__getitem__)
        self._rows[part] += 1
        self._at[request] = (part, np.zeros(self.per_request, np.int32), 0)
        if self.held == "rows":
            self.reach(request, self.longest)

    def reach(self, request: int, positions: int) -> None:
        """Pages for so many positions of a request, where it has not got them."""
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
        """A request's part, and its pages in their order."""
        part, table, _ = self._at[request]
        return part, table

    def release(self, request: int) -> None:
        """Takes back what a request held."""
        part, table, n = self._at.pop(request)
        self._rows[part] -= 1
        self._free[part].extend(int(p) for p in table[:n][::-1])

    def __contains__(self, request: int) -> bool:
        return request in self._at
