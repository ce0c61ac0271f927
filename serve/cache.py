"""What the scheduler asks of a KV cache's book-keeping. The memory itself belongs to the runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serve.plan import Copy

Span = Callable[[int, int], list[int]]  # a request's tokens from one position up to another


class Table:
    """A request's hold on the cache. `blocks` is the table that its segments carry, kept up to date in place."""

    __slots__ = ("blocks",)

    def __init__(self, blocks: NDArray[np.int32]) -> None:
        self.blocks = blocks


@dataclass(frozen=True, slots=True)
class Allocation:
    """A table whose first `reused` tokens are already computed, once `copy` (if any) was done."""

    table: Table
    reused: int
    copy: Copy | None = None


class Cache(Protocol):
    """Allocates tables. A table is whoever's allocated it, until it is freed."""

    capacity: int  # tokens that one request may have

    @property
    def usage(self) -> float:
        """Share of the cache that running requests hold, 0 to 1."""

    def allocate(self, tokens: Sequence[int], *, reuse: bool = True) -> Allocation | None:
        """Room for `tokens`, with the longest beginning of them that is there already; None while there is none.

        At least one token is left to compute, since its logits are wanted. Without `reuse`, all of them are.
        """

    def grow(self, table: Table, length: int) -> bool:
        """Make room for `length` tokens; False, and nothing has changed, if there is none."""

    def advance(self, table: Table, length: int, span: Span) -> None:
        """The first `length` tokens are computed now and may be reused by others; `span` tells which they are."""

    def forget(self, table: Table) -> None:
        """After a failed run: nothing that only this table holds may be reused."""

    def free(self, table: Table) -> None:
        """Give the table back; what was computed stays reusable until its place is needed."""

    def check(self) -> None:
        """The conservation law: everything is free, kept for reuse or in use, and never two of them."""
