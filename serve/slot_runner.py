"""From a plan to runs, for graphs that want each request in one place.

GroupQueryAttention takes a ragged batch of single tokens, or one sequence of many. So a plan becomes one decode run
over all its single-token segments and a run per prompt chunk. The cache is a pool `[rows, kv_heads, capacity,
head_size]` per layer for keys and for values, written in place: a decode run of B rows sees rows 0 to B - 1, a chunk
sees its own row.

A request therefore lies in one place: a block is a slot of `capacity` tokens, and a block table holds one. Rows that
decode must be among the first ones. The runner keeps its own map from slot to row and exchanges rows when the decoding
slots lie elsewhere, so nobody above needs to know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from serve.plan import Copy, Plan, Runner, Segment


class SlotRunner(Runner, ABC):
    """The map of rows, and the order of the runs; a subclass has the memory and makes them. One thread at a time."""

    any_chunking = False  # attention is computed in floating point, in an order that depends on the cuts

    def __init__(self, num_slots: int) -> None:
        self.kv_bytes = 0
        self._row_of = list(range(num_slots))
        self._slot_in = list(range(num_slots))
        self._length = [0] * num_slots  # valid tokens, by slot

    def _begin(self, plan: Plan) -> dict[int, int]:
        """Make the runs of `plan`: of each position that is wanted, in which row its results lie."""
        for copy in plan.copies:
            self._copy_row(self._row_of[copy.source], self._row_of[copy.target], copy)
            self._length[copy.target] = copy.length
        slots = [int(segment.blocks[0]) for segment in plan.segments]
        wanted = _wanted_by_segment(plan)
        self._reserve(len(plan.wanted) + len(plan.hidden) + 1)
        decode = [i for i, s in enumerate(plan.segments) if s.count == 1 and len(wanted[i]) == 1]
        index: dict[int, int] = {}  # flat position -> row of the result buffers
        filled = 0
        if decode:
            filled = self._batch(len(decode))
            self._gather_rows([slots[i] for i in decode], filled)
            for i in decode:
                index[plan.segments[i].start] = self._row_of[slots[i]]
            self._run_decode(plan, [(self._row_of[slots[i]], plan.segments[i]) for i in decode], filled)
        for i, segment in enumerate(plan.segments):
            if segment.count > 1 or len(wanted[i]) != 1:
                rows = [at - segment.start for at in wanted[i]]
                # At least one row: the graph's head does not take none.
                self._run_chunk(plan, segment, self._row_of[slots[i]], rows or [segment.count - 1], filled)
                index.update((at, filled + n) for n, at in enumerate(wanted[i]))
                filled += len(wanted[i])
        for slot, segment in zip(slots, plan.segments, strict=True):
            self._length[slot] = segment.past + segment.count
        return index

    def _gather_rows(self, slots: list[int], batch: int) -> None:
        """Move the decoding slots into the first `batch` rows."""
        holes = [row for row in range(batch) if self._slot_in[row] not in set(slots)]
        for slot in slots:
            if self._row_of[slot] >= batch:
                self._exchange(self._row_of[slot], holes.pop())

    def _exchange(self, a: int, b: int) -> None:
        slot_a, slot_b = self._slot_in[a], self._slot_in[b]
        self._swap_rows(a, b, self._length[slot_a], self._length[slot_b])
        self._slot_in[a], self._slot_in[b] = slot_b, slot_a
        self._row_of[slot_a], self._row_of[slot_b] = b, a

    @abstractmethod
    def _batch(self, num_rows: int) -> int:
        """How many rows a decode run of `num_rows` has."""

    @abstractmethod
    def _reserve(self, rows: int) -> None:
        """Make room for the results of `rows` rows beside a decode run's."""

    @abstractmethod
    def _run_decode(self, plan: Plan, segments: Sequence[tuple[int, Segment]], batch: int) -> None:
        """Run single tokens, each with its row; a row's results go to the result buffers' row of that number."""

    @abstractmethod
    def _run_chunk(self, plan: Plan, segment: Segment, row: int, wanted: list[int], filled: int) -> None:
        """Run a segment that lies in `row`; its `wanted` positions' results go to the buffers from `filled` on."""

    @abstractmethod
    def _swap_rows(self, a: int, b: int, used_a: int, used_b: int) -> None:
        """Exchange two rows of the cache, of which so many tokens are in use."""

    @abstractmethod
    def _copy_row(self, source: int, target: int, copy: Copy) -> None:
        """Copy the first `copy.length` tokens of a row of the cache."""


def _wanted_by_segment(plan: Plan) -> list[list[int]]:
    """Positions whose logits or hidden state is wanted: the graph computes both."""
    wanted: list[list[int]] = [[] for _ in plan.segments]
    owner = [i for i, s in enumerate(plan.segments) for _ in range(s.count)]
    for at in [*plan.wanted, *plan.hidden]:
        wanted[owner[at]].append(at)
    return wanted
