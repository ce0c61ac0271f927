"""The block cache, for runners that read through block tables: which block holds which tokens.

A request's tokens lie in blocks of `BLOCK`, the last one partly filled. Full blocks, of prompt or completion, hang in a
tree: a node is a block behind a certain beginning, found by its tokens, compared one by one. Whoever has the same
beginning reads the same block, without a copy: the runner's bits do not depend on how a sequence was cut. Two requests
that compute the same block at the same time share one from then on.

A node that no table holds stays in the tree until its block is needed: the least recently used goes first, and always
before the node that it hangs from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from serve.cache import Allocation, Span, Table

BLOCK = 64  # tokens, fixed by the native operators (docs/native.md)


@dataclass(slots=True, eq=False)
class Node:
    """A full block whose content is known."""

    parent: Node | None
    tokens: tuple[int, ...]
    block: int
    tables: int = 0  # that hold it
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)


@dataclass(slots=True)
class Hold:
    """What a table holds: `count` blocks, the first of them in the tree."""

    count: int
    nodes: list[Node]


def blocks_for(length: int) -> int:
    """The blocks that `length` tokens need."""
    return -(-length // BLOCK)


class BlockCache:
    """Allocates tables of `num_blocks` blocks, for requests of at most `capacity` tokens."""

    def __init__(self, num_blocks: int, capacity: int) -> None:
        self.num_blocks = num_blocks
        self.capacity = min(capacity, num_blocks * BLOCK)  # so that a request alone always fits
        self._root = Node(None, (), -1)
        self._free = list(range(num_blocks))[::-1]
        # Nodes without a table, least recently used first. Freeing appends a table's last node first, so that
        # children stand before their parents.
        self._kept: OrderedDict[Node, None] = OrderedDict()
        self._holds: dict[Table, Hold] = {}

    @property
    def usage(self) -> float:
        """Share of the blocks that running requests hold, 0 to 1."""
        return 1 - self._available / self.num_blocks

    def allocate(self, tokens: Sequence[int], *, reuse: bool = True) -> Allocation | None:
        """Take blocks for all `tokens`, or none while that would leave running requests no block each to grow into."""
        width = blocks_for(self.capacity)
        nodes = self._find(tokens) if reuse else []
        needed = blocks_for(len(tokens)) - len(nodes)
        spare = sum(hold.count < width for hold in self._holds.values())
        if needed + spare > self._available - sum(node.tables == 0 for node in nodes):
            return None
        table = Table(np.zeros(width, np.int32))
        self._holds[table] = Hold(len(nodes), nodes)
        for at, node in enumerate(nodes):
            self._take_up(node)
            table.blocks[at] = node.block
        grown = self.grow(table, len(tokens))
        assert grown
        return Allocation(table, len(nodes) * BLOCK)

    def grow(self, table: Table, length: int) -> bool:
        """Make room for `length` tokens; False, and nothing has changed, if there is none."""
        hold = self._holds[table]
        needed = blocks_for(length)
        if needed <= hold.count:
            return True
        if length > self.capacity or needed - hold.count > self._available:
            return False
        for at in range(hold.count, needed):
            table.blocks[at] = self._free.pop() if self._free else self._evict()
        hold.count = needed
        return True

    def advance(self, table: Table, length: int, span: Span) -> None:
        """The first `length` tokens are computed now; full blocks among them go into the tree."""
        nodes = self._holds[table].nodes
        while (end := (len(nodes) + 1) * BLOCK) <= length:
            parent = nodes[-1] if nodes else self._root
            tokens, block = tuple(span(end - BLOCK, end)), int(table.blocks[len(nodes)])
            node = parent.children.get(tokens)
            if node is None:
                node = parent.children[tokens] = Node(parent, tokens, block, tables=1)
            else:
                self._take_up(node)
                self._free.append(block)
                table.blocks[len(nodes)] = node.block
            nodes.append(node)

    def forget(self, table: Table) -> None:
        """Take what only this table holds, and what hangs from it, out of the tree."""
        nodes = self._holds[table].nodes
        shared = sum(node.tables > 1 for node in nodes)  # these come first
        if shared == len(nodes):
            return
        doubtful = nodes[shared]
        assert doubtful.parent is not None
        del doubtful.parent.children[doubtful.tokens]
        below = [doubtful]
        while below:
            node = below.pop()
            below += node.children.values()
            if node.tables == 0:
                del self._kept[node]
                self._free.append(node.block)
        del nodes[shared:]

    def free(self, table: Table) -> None:
        """Give the table's blocks back; those in the tree stay reusable until they are needed."""
        hold = self._holds.pop(table)
        self._free += table.blocks[len(hold.nodes) : hold.count].tolist()
        for node in reversed(hold.nodes):
            node.tables -= 1
            if node.tables == 0:
                self._kept[node] = None

    def check(self) -> None:
        """The conservation law: every block is free, kept or held, and held as often as tables say."""
        held: dict[Node, int] = {}
        own: list[int] = []
        for table, hold in self._holds.items():
            assert table.blocks[: len(hold.nodes)].tolist() == [node.block for node in hold.nodes]
            own += table.blocks[len(hold.nodes) : hold.count].tolist()
            for node in hold.nodes:
                held[node] = held.get(node, 0) + 1
        tree = [self._root]
        for node in tree:
            tree += node.children.values()
        assert all(node.tables == held.get(node, 0) for node in tree[1:])
        assert {node for node in tree[1:] if node.tables == 0} == self._kept.keys()
        blocks = self._free + own + [node.block for node in tree[1:]]
        assert sorted(blocks) == list(range(self.num_blocks))
        gone: set[Node] = set()
        for node in self._kept:
            assert gone.issuperset(node.children.values())
            gone.add(node)

    @property
    def _available(self) -> int:
        return len(self._free) + len(self._kept)

    def _find(self, tokens: Sequence[int]) -> list[Node]:
        """The nodes of the longest beginning of `tokens`, without their last token."""
        node, nodes = self._root, list[Node]()
        for start in range(0, len(tokens) - BLOCK, BLOCK):
            child = node.children.get(tuple(tokens[start : start + BLOCK]))
            if child is None:
                break
            nodes.append(child)
            node = child
        return nodes

    def _take_up(self, node: Node) -> None:
        if node.tables == 0:
            del self._kept[node]
        node.tables += 1

    def _evict(self) -> int:
        node, _ = self._kept.popitem(last=False)
        assert node.parent is not None
        assert not node.children
        del node.parent.children[node.tokens]
        return node.block
