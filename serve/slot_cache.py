"""The slot cache, for runners that want a whole request in one place: which slot holds which tokens.

A slot is either free or owned by one request; a free slot keeps the tokens of its last owner until it is taken
again, so that a prompt with the same beginning can reuse them. Reuse is cut to whole blocks of `block` tokens that
were computed as prompt chunks: such keys and values have the same bits whoever computed them, so a request's answer
does not depend on what was cached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from serve.cache import Allocation, Span, Table
from serve.plan import Copy


class SlotCache:
    """Allocates `num_slots` slots of `capacity` tokens each; a table holds one slot."""

    def __init__(self, num_slots: int, capacity: int, block: int) -> None:
        self.num_slots = num_slots
        self.capacity = capacity
        self.block = block
        self._reusable: list[list[int]] = [[] for _ in range(num_slots)]  # whole blocks of prompt, per slot
        self._length = [0] * num_slots  # tokens in use, per owned slot
        self._prompt = [0] * num_slots  # tokens of the prompt, per owned slot
        self._free: OrderedDict[int, None] = OrderedDict((slot, None) for slot in range(num_slots))  # oldest first
        self._used: set[int] = set()

    @property
    def usage(self) -> float:
        """Share of the cache's tokens that running requests hold, 0 to 1."""
        return sum(self._length) / (self.num_slots * self.capacity)

    def allocate(self, tokens: Sequence[int], *, reuse: bool = True) -> Allocation | None:
        """Take the slot that saves most prefill, or None if all are owned."""
        if not self._free:
            return None
        best, reused = self._longest_prefix(tokens) if reuse else (0, 0)
        oldest = next(iter(self._free))
        # In place only where nothing else is lost: a free slot that holds more than the common prefix stays as it is.
        in_place = reused and best in self._free and len(self._reusable[best]) == reused
        slot = best if in_place else oldest
        copy = Copy(best, slot, reused) if reused and slot != best else None
        del self._free[slot]
        self._used.add(slot)
        self._reusable[slot] = list(tokens[:reused])
        self._length[slot] = reused
        self._prompt[slot] = len(tokens)
        return Allocation(Table(np.array([slot], np.int32)), reused, copy)

    def grow(self, table: Table, length: int) -> bool:
        """A slot has room for a whole request from the start."""
        return length <= self.capacity

    def advance(self, table: Table, length: int, span: Span) -> None:
        """`length` tokens of the slot are computed now; whole blocks of the prompt among them can be reused."""
        slot = int(table.blocks[0])
        assert slot in self._used
        assert self._length[slot] <= length <= self.capacity
        self._length[slot] = length
        held = self._reusable[slot]
        if (end := min(length, self._prompt[slot]) // self.block * self.block) > len(held):
            held += span(len(held), end)

    def forget(self, table: Table) -> None:
        """Declare a slot's content unusable, after a failed run."""
        self._reusable[table.blocks[0]] = []

    def free(self, table: Table) -> None:
        """Give a slot back; its prompt's blocks stay reusable until it is taken again."""
        slot = int(table.blocks[0])
        self._used.remove(slot)
        self._length[slot] = 0
        self._free[slot] = None
        if not self._reusable[slot]:
            self._free.move_to_end(slot, last=False)  # nothing to lose: take it first

    def check(self) -> None:
        """The conservation law: every slot is free or owned, never both."""
        assert self._used.isdisjoint(self._free)
        assert len(self._used) + len(self._free) == self.num_slots
        assert all(length == 0 for slot, length in enumerate(self._length) if slot in self._free)

    def _longest_prefix(self, prompt: Sequence[int]) -> tuple[int, int]:
        """(slot, tokens) of the longest reusable beginning of `prompt`, in whole blocks."""
        limit = (len(prompt) - 1) // self.block * self.block
        best, longest = 0, 0
        for slot, held in enumerate(self._reusable):
            common = 0
            while common < min(limit, len(held)) and all(
                held[i] == prompt[i] for i in range(common, common + self.block)
            ):
                common += self.block
            if common > longest or (common == longest and common and slot in self._free and best not in self._free):
                best, longest = slot, common
        return best, longest
