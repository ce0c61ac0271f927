"""What the benchmark compares: ours and every peer answer to this."""

from __future__ import annotations

from typing import Protocol

from bench.row import Load, Row
from bench.server import Server


class System(Protocol):
    """Made without cost; `prepare` comes before everything else."""

    @property
    def name(self) -> str:
        """As the table shows it."""

    @property
    def version(self) -> str:
        """What was measured, exactly."""

    def prepare(self) -> None:
        """Make what is not there yet; the second time that is nothing."""

    def weight_bytes(self) -> int:
        """Read for each token of one stream."""

    def engine_rows(self, loads: list[Load]) -> list[Row]:
        """The engine alone, in a process of its own. Loads that it cannot run are left out."""

    def server(self, loads: list[Load]) -> Server | None:
        """A server with room for each of `loads`; None if the project ships no OpenAI server."""
