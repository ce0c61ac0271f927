"""Which slot holds which tokens. The memory itself belongs to the runner; this is its book-keeping.

A slot is either free or owned by one request; a free slot keeps the tokens of its last owner until it is taken
again, so that a prompt with the same beginning can reuse them. Reuse is cut to whole blocks of `block` tokens that
were computed as prompt chunks: such keys and values have the same bits whoever computed them, so a request's answer
does not depend on what was cached.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from serve.plan import Copy


@dataclass(frozen=True, slots=True)
class Allocation:
    """A slot whose first `reused` tokens are already there, once `copy` (if any) was done."""

    slot: int
    reused: int
    copy: Copy | None


class KVCache:
    """Allocates `num_slots` slots of `capacity` tokens each."""

    def __init__(self, num_slots: int, capacity: int, block: int) -> None:
        self.num_slots = num_slots
        self.capacity = capacity
        self.block = block
        self._reusable: list[list[int]] = [[] for _ in range(num_slots)]  # whole blocks of prompt, per slot
        self._length = [0] * num_slots  # tokens in use, per owned slot
        self._free: OrderedDict[int, None] = OrderedDict((slot, None) for slot in range(num_slots))  # oldest first
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the cache's tokens that running requests hold, 0 to 1."""
        return sum(self._length) / (self.num_slots * self.capacity)

    def allocate(self, prompt: Sequence[int]) -> Allocation | None:
        """Take the slot that saves most prefill, or None if all are owned.

        At least one token of the prompt is left to compute, since its logits are wanted.
        """
        if not self._free:
            return None
        best, reused = self._longest_prefix(prompt)
        oldest = next(iter(self._free))
        # In place only where nothing else is lost: a free slot that holds more than the common prefix stays as it is.
        in_place = reused and best in self._free and len(self._reusable[best]) == reused
        slot = best if in_place else oldest
        copy = Copy(best, slot, reused) if reused and slot != best else None
        del self._free[slot]
        self._used.add(slot)
        self._reusable[slot] = list(prompt[:reused])
        self._length[slot] = reused
        return Allocation(slot, reused, copy)

    def advance(self, slot: int, length: int, prompt: Sequence[int]) -> None:
        """`length` tokens of the slot are computed now; whole blocks of the prompt among them can be reused."""
        assert slot in self._used
        assert self._length[slot] <= length <= self.capacity
        self._length[slot] = length
        held = self._reusable[slot]
        held += prompt[len(held) : min(length, len(prompt)) // self.block * self.block]

    def free(self, slot: int) -> None:
        """Give a slot back; its prompt's blocks stay reusable until it is taken again."""
        self._used.remove(slot)
        self._length[slot] = 0
        self._free[slot] = None
        if not self._reusable[slot]:
            self._free.move_to_end(slot, last=False)  # nothing to lose: take it first

    def forget(self, slot: int) -> None:
        """Declare a slot's content unusable, after a failed run."""
        self._reusable[slot] = []

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
