"""How long records are kept: text shorter than the rest."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from proto.records import to_created
from serve import derived
from serve.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Retention:
    """Days to keep; 0: for ever. `derived` holds snapshots and datasets, whose text expires too."""

    content_days: int = 0
    metadata_days: int = 0
    derived: Path | None = None

    def apply(self, store: Store, now: datetime | None = None) -> int:
        """Delete what is too old; returns how many rows changed. Raises what the store raises, and LineageError."""
        now = now or datetime.now(UTC)
        content, metadata = _before(now, self.content_days), _before(now, self.metadata_days)
        text = max(filter(None, (content, metadata)), default=None)  # where all of an interaction goes, its text does
        if text is None:
            return 0
        for folder in derived.expire(self.derived, text) if self.derived else ():
            log.info("%s held text from before %s and was emptied", folder, text)
        return store.expire(text, metadata)


def _before(now: datetime, days: int) -> str | None:
    return to_created(now - timedelta(days=days)) if days else None
