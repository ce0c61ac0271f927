"""What the history of a registry adds up to, and which movements can follow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from proto.registry import Movement, Pointer, RegistryError, Role


@dataclass(frozen=True, slots=True)
class State:
    """`line` are the versions that were promoted, without those that were rolled back; the last one is served."""

    published: frozenset[str] = frozenset()
    line: tuple[str, ...] = ()
    moved: Movement | None = None  # what made the last of `line` current
    trial: Movement | None = None  # what gave the candidate its share

    @property
    def current(self) -> str | None:
        return self.line[-1] if self.line else None

    @property
    def candidate(self) -> str | None:
        return self.trial.version if self.trial else None

    def after(self, movement: Movement) -> State:
        """Raises RegistryError that says why the movement cannot be made, and what can."""
        version = movement.version
        name = version[:12]
        if movement.action == "publish":
            if version in self.published:
                raise RegistryError(f"version {name} is published already")
            return replace(self, published=self.published | {version})
        if version not in self.published:
            raise RegistryError(f"version {name} is not published; `python -m deploy publish` it")
        if movement.action == "canary":
            if self.current is None:
                raise RegistryError(f"nothing is served that version {name} could be tried against; promote it")
            if version == self.current:
                raise RegistryError(f"version {name} is current; there is nothing to try")
            if self.trial and version != self.trial.version:
                raise RegistryError(f"version {self.trial.version[:12]} is on trial; promote or reject it first")
            return replace(self, trial=movement)
        if movement.action == "reject":
            if version != self.candidate:
                raise RegistryError(f"version {name} is not on trial")
            return replace(self, trial=None)
        if movement.action == "promote":
            if version == self.current:
                raise RegistryError(f"version {name} is current already")
            line = (*self.line, version)
        else:
            if version != self.current:
                raise RegistryError(f"version {name} is not current, so it cannot be rolled back")
            if len(self.line) < 2:
                raise RegistryError(f"there is no version before {name}; promote another one")
            line = self.line[:-1]
        return replace(self, line=line, moved=movement, trial=None if self.candidate == line[-1] else self.trial)

    def pointers(self) -> dict[Role, Pointer | None]:
        """In the order of writing: the candidate's share goes only when `current` has taken over."""
        found: dict[Role, Pointer | None] = {"previous": None, "current": None, "candidate": None}
        if self.moved:
            roles: tuple[Role, Role] = ("current", "previous")
            for role, version in zip(roles, reversed(self.line[-2:]), strict=False):
                found[role] = Pointer(version=version, since=self.moved.time, by=self.moved.by, why=self.moved.why)
        if self.trial:
            t = self.trial
            found["candidate"] = Pointer(version=t.version, since=t.time, by=t.by, why=t.why, share=t.share)
        return found


def add_up(history: Iterable[Movement]) -> State:
    """Raises RegistryError for a line that cannot follow those before it, which only a person can have written."""
    state = State()
    for number, movement in enumerate(history, 1):
        try:
            state = state.after(movement)
        except RegistryError as error:
            raise RegistryError(f"line {number} of the history: {error}") from error
    return state
