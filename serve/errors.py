"""What can go wrong with a request, as one small tree; each adapter maps it to its protocol in one place.

`status` is the HTTP status; `serve.grpc_api` maps the same classes to gRPC codes. `kind`, `code` and `param`, which
names the offending parameter, are those of OpenAI's error body. Messages name the value, the limit and the cure.
"""

from __future__ import annotations


class PawlError(Exception):
    """Base of all errors a client may see. `kind` is the `type` of OpenAI's error body."""

    status = 500
    kind = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(PawlError):
    """The request itself is wrong: malformed, out of limits, or asks for what we do not support."""

    status = 400
    kind = "invalid_request_error"


class Unauthenticated(PawlError):
    """No API key, or a wrong one."""

    status = 401
    kind = "authentication_error"


class Forbidden(PawlError):
    """The API key is known, and not for this."""

    status = 403
    kind = "permission_error"


class NotFound(PawlError):
    """The model, route or inference id does not exist."""

    status = 404
    kind = "not_found_error"


class TooLarge(PawlError):
    """The body exceeds the limit in bytes."""

    status = 413
    kind = "invalid_request_error"


class Overloaded(PawlError):
    """The bounded queue is full; try again after `retry_after_seconds`."""

    status = 503
    kind = "overloaded_error"

    def __init__(self, message: str, *, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Draining(Overloaded):
    """The server is shutting down: it finishes what it accepted and accepts nothing new."""


class Unavailable(Overloaded):
    """A part the request needs is out of order (a full disk, for instance); inference goes on."""


class InsufficientStorage(Unavailable):
    """The disk of the records is full (RFC 4918 calls the condition temporary); inference goes on."""

    status = 507
    code = "insufficient_storage"


class TimedOut(PawlError):
    """The request ran into the server's time limit."""

    status = 504
    kind = "timeout_error"
    code = "request_timeout"


class InternalError(PawlError):
    """Our fault. The request failed; the engine goes on."""
