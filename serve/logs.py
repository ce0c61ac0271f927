"""The server's log: lines for people, or one JSON object a line. What it is given is escaped, so a line stays a line.

A line that has to do with a call tells its request id: the client's `X-Request-Id`, and for what happens inside the
engine the answer's id. Prompts and answers are never logged.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")  # of the call that this task answers
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def escape(text: str) -> str:
    """Control characters and what is no character, as in Python's `repr`."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class TextFormatter(logging.Formatter):
    """One line, and for an exception its traceback, each of whose lines begins with a tab."""

    def format(self, record: logging.LogRecord) -> str:
        request_id = request_id_of(record)
        told = f" [{request_id}]" if request_id else ""
        line = f"{self.formatTime(record)} {record.levelname} {record.name}:{told} {escape(record.getMessage())}"
        return "\n\t".join([line, *map(escape, traceback_of(self, record).splitlines())])


class JsonFormatter(logging.Formatter):
    """One object: `time` in UTC, `level`, `logger`, `message`, and maybe `request_id` and `traceback`."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id_of(record),
            "traceback": traceback_of(self, record),
        }
        return json.dumps({name: value for name, value in told.items() if value})  # ASCII: all else is escaped


def request_id_of(record: logging.LogRecord) -> str:
    return getattr(record, "request_id", "") or REQUEST_ID.get()


def traceback_of(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """ "" for no exception."""
    return formatter.formatException(record.exc_info) if record.exc_info else ""


def start_log(kind: str) -> None:
    """Log to standard error from INFO on; `kind` is `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
