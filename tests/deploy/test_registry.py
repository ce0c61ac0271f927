"""The registry: what movements do, and what killed, torn, concurrent and damaged ones leave."""

from __future__ import annotations

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.errors import DeployError
from deploy.lock import exclusive
from deploy.places import Folder
from deploy.registry import Registry
from deploy.state import State, add_up
from proto.manifest import MANIFEST, WEIGHTS, ManifestError
from proto.registry import (
    HISTORY,
    ROLES,
    Movement,
    Pointer,
    RegistryError,
    decode_pointer,
    encode_movement,
    version_folder,
)
from tests.deploy.artifacts import make_artifact

VERSIONS = ["a" * 64, "b" * 64, "c" * 64]
TIME = "2026-11-21T14:00:00.000Z"
ACTIONS = ["publish", "canary", "promote", "reject", "rollback"]
moves = st.lists(st.tuples(st.sampled_from(ACTIONS), st.sampled_from(VERSIONS)), max_size=25)


class Killed(BaseException):
    """Not even `except Exception` sees it, as with SIGKILL."""


class Dying(Folder):
    """Dies before its n-th write; an append is torn first."""

    def __init__(self, root: Path, writes: int) -> None:
        super().__init__(root)
        self.left = writes

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    def replace(self, name: str, data: bytes) -> None:
        self.spend()
        super().replace(name, data)

    def remove(self, name: str) -> None:
        self.spend()
        super().remove(name)

    def append(self, name: str, line: bytes) -> None:
        try:
            self.spend()
        except Killed:
            super().append(name, line[: len(line) // 2])
            raise
        super().append(name, line)


def movement(action: str, version: str, share: float = 0.0) -> Movement:
    return Movement(time=TIME, action=action, version=version, by="ann", why="a test", share=share)  # type: ignore[arg-type]


def filled(url: str, artifacts: dict[str, Path]) -> tuple[Registry, list[str]]:
    """A registry with three versions, and those."""
    registry = Registry(url)
    return registry, [registry.publish(path, by="ann", why="a test") for path in artifacts.values()]


def pointers(url: str) -> dict[str, str | None]:
    """Role -> version, by the files."""
    system, root = fsspec.url_to_fs(url)
    found: dict[str, str | None] = {}
    for role in ROLES:
        path = f"{root}/{role}"
        found[role] = decode_pointer(system.cat_file(path), role).version if system.exists(path) else None
    return found


def roles(current: str | None, previous: str | None = None, candidate: str | None = None) -> dict[str, str | None]:
    return {"current": current, "candidate": candidate, "previous": previous}


# -- the state, for any history ---------------------------------------------------------------------------------------


def possible(wishes: list[tuple[str, str]]) -> tuple[State, list[Movement]]:
    """The state after those of the wished movements that can be made."""
    state, made = State(), []
    for action, version in wishes:
        try:
            state = state.after(movement(action, version))
        except RegistryError:
            continue
        made.append(movement(action, version))
    return state, made


@given(moves, st.sampled_from(VERSIONS))
def test_a_rollback_undoes_a_promotion(wishes: list[tuple[str, str]], version: str) -> None:
    before, _ = possible([("publish", version), *wishes])
    if version == before.current or not before.line:
        return
    promoted = before.after(movement("promote", version))
    assert (promoted.current, promoted.line[-2]) == (version, before.current)
    restored = promoted.after(movement("rollback", version))
    assert restored.line == before.line
    assert restored.candidate in (before.candidate, None)
    assert (restored.candidate is None) == (before.candidate in (version, None))


@given(moves)
def test_any_history_holds_together(wishes: list[tuple[str, str]]) -> None:
    state, made = possible(wishes)
    assert add_up(made) == state
    assert {*state.line, *filter(None, [state.candidate])} <= state.published
    assert all(a != b for a, b in zip(state.line, state.line[1:], strict=False))
    assert state.candidate is None or state.candidate != state.current
    found = state.pointers()
    assert [found[role] and found[role].version for role in ("current", "candidate")] == [  # type: ignore[union-attr]
        state.current,
        state.candidate,
    ]
    assert (found["previous"] is None) == (len(state.line) < 2)


@pytest.mark.parametrize(
    ("before", "wish", "message"),
    [
        ([], ("promote", "a"), "is not published"),
        (["publish a"], ("publish", "a"), "is published already"),
        (["publish a"], ("canary", "a"), "nothing is served"),
        (["publish a"], ("rollback", "a"), "is not current"),
        (["publish a"], ("reject", "a"), "is not on trial"),
        (["publish a", "promote a"], ("rollback", "a"), "there is no version before"),
        (["publish a", "promote a"], ("promote", "a"), "is current already"),
        (["publish a", "promote a"], ("canary", "a"), "there is nothing to try"),
        (
            ["publish a", "publish b", "publish c", "promote a", "canary b"],
            ("canary", "c"),
            "version bbbbbbbbbbbb is on trial; promote or reject it first",
        ),
        (["publish a", "publish b", "promote a", "promote b"], ("rollback", "a"), "is not current"),
    ],
)
def test_what_cannot_be_done_is_refused(before: list[str], wish: tuple[str, str], message: str) -> None:
    state = add_up(movement(action, 64 * name) for action, name in map(str.split, before))
    with pytest.raises(RegistryError, match=message):
        state.after(movement(wish[0], 64 * wish[1]))


def test_a_history_that_cannot_be_is_refused_by_its_line() -> None:
    with pytest.raises(RegistryError, match="line 2 of the history: version bbbbbbbbbbbb is not published"):
        add_up([movement("publish", VERSIONS[0]), movement("promote", VERSIONS[1])])


# -- the files --------------------------------------------------------------------------------------------------------


def test_the_pointers_follow_the_movements(url: str, artifacts: dict[str, Path]) -> None:
    registry, (one, two, three) = filled(url, artifacts)
    assert pointers(url) == roles(None)
    registry.move("promote", one, by="ann", why="first")
    assert pointers(url) == roles(one)
    registry.move("canary", two, by="ann", why="tried", share=0.1)
    assert pointers(url) == roles(one, None, two)
    registry.move("promote", two, by="ben", why="better", evidence={"errors": 0})
    assert pointers(url) == roles(two, one)
    registry.move("canary", three, by="ann", why="tried", share=0.2)
    registry.move("reject", three, by="ann", why="worse", evidence="runs/7/verdict.json")
    assert pointers(url) == roles(two, one)
    registry.move("rollback", two, by="ann", why="complaints")
    assert pointers(url) == roles(one)
    assert [m.action for m in registry.history()] == [
        *["publish"] * 3,
        *["promote", "canary", "promote", "canary", "reject", "rollback"],
    ]
    assert [m.evidence for m in registry.history() if m.evidence] == [{"errors": 0}, "runs/7/verdict.json"]
    assert registry.resolve("current") == registry.resolve(one[:6]) == one
    for version in artifacts:
        assert registry.verify(version).digest == version


def test_the_candidates_pointer_carries_its_share(tmp_path: Path, artifacts: dict[str, Path]) -> None:
    registry, (one, two, _) = filled(str(tmp_path), artifacts)
    registry.move("promote", one, by="ann", why="first")
    registry.move("canary", two, by="ann", why="tried", share=0.1)
    last = registry.history()[-1]
    assert decode_pointer((tmp_path / "candidate").read_bytes(), "candidate") == Pointer(
        version=two, since=last.time, by="ann", why="tried", share=0.1
    )


def test_a_version_is_published_once(url: str, artifacts: dict[str, Path]) -> None:
    registry, (one, *_) = filled(url, artifacts)
    assert registry.publish(artifacts[one], by="ben", why="again") == one
    assert len(registry.history()) == 3


def test_a_refused_movement_leaves_no_trace(url: str, artifacts: dict[str, Path]) -> None:
    registry, (one, *_) = filled(url, artifacts)
    registry.move("promote", one, by="ann", why="first")
    before = registry.history(), pointers(url)
    with pytest.raises(RegistryError, match="no version before"):
        registry.move("rollback", one, by="ann", why="")
    with pytest.raises(RegistryError, match=r"why"):
        registry.move("promote", registry.resolve(list(artifacts)[1]), by="ann", why="")
    assert (registry.history(), pointers(url)) == before


@pytest.mark.parametrize("name", ["", "xyz", "aaa", "candidate"])
def test_a_name_that_means_no_version_is_refused(name: str, tmp_path: Path, artifacts: dict[str, Path]) -> None:
    registry, _ = filled(str(tmp_path), artifacts)
    with pytest.raises(RegistryError, match=r"is not a version of|has no candidate version"):
        registry.resolve(name)


def test_a_url_without_a_driver_is_refused() -> None:
    with pytest.raises(RegistryError, match="nosuch"):
        Registry("nosuch://bucket/registry")


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["bit", "file", "manifest"])
def test_a_damaged_version_is_refused_and_can_be_healed(damage: str, url: str, artifacts: dict[str, Path]) -> None:
    registry, (one, two, _) = filled(url, artifacts)
    system, root = fsspec.url_to_fs(url)
    folder = f"{root}/{version_folder(one)}"
    if damage == "bit":
        data = bytearray(system.cat_file(f"{folder}/{WEIGHTS}"))
        data[7] ^= 1
        system.rm_file(f"{folder}/{WEIGHTS}")
        system.pipe_file(f"{folder}/{WEIGHTS}", bytes(data))
    elif damage == "file":
        system.rm_file(f"{folder}/{WEIGHTS}")
    else:  # another version, whole in itself
        system.rm(folder, recursive=True)
        system.copy(f"{root}/{version_folder(two)}/", f"{folder}/", recursive=True)
    with pytest.raises(RegistryError, match=f"version {one[:12]} is damaged"):
        registry.verify(one)
    registry.publish(artifacts[one], by="ann", why="healed")
    assert registry.verify(one).digest == one


def test_a_damaged_artifact_is_not_published(tmp_path: Path) -> None:
    make_artifact(tmp_path / "bad", "bad")
    (tmp_path / "bad" / WEIGHTS).write_text("else")
    with pytest.raises(ManifestError):
        Registry(str(tmp_path / "registry")).publish(tmp_path / "bad", by="ann", why="a test")
    assert not (tmp_path / "registry").exists()


def test_versions_are_read_only(tmp_path: Path, artifacts: dict[str, Path]) -> None:
    _, (one, *_) = filled(str(tmp_path), artifacts)
    modes = {file.stat().st_mode & 0o222 for file in (tmp_path / version_folder(one)).iterdir()}
    assert modes == {0}


# -- kills and company ------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS[1:]), st.integers(0, 2)), min_size=1, max_size=8), st.integers(0, 4))
def test_a_killed_movement_is_made_or_not(wishes: list[tuple[str, int]], writes: int) -> None:
    """The last of the wished movements dies before one of its writes. Whoever comes next finds it made or not."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / HISTORY).write_bytes(b"".join(encode_movement(movement("publish", version)) for version in VERSIONS))
        registry = Registry(temporary)
        registry.move("promote", VERSIONS[0], by="ann", why="first")
        for action, version in wishes[:-1]:
            try:
                registry.move(action, VERSIONS[version], by="ann", why="a test")  # type: ignore[arg-type]
            except RegistryError:
                continue
        before = registry.state()
        action, version = wishes[-1]
        dying = Registry(temporary)
        dying._place = Dying(root, writes)
        died = False
        try:
            dying.move(action, VERSIONS[version], by="ann", why="killed")  # type: ignore[arg-type]
        except Killed:
            died = True
        except RegistryError:
            return
        after = registry.settle()
        assert (after == before) == (died and writes == 0)  # the history's line is the first write
        wanted = {role: pointer and pointer.version for role, pointer in after.pointers().items()}
        assert pointers(temporary) == wanted
        assert not (root / HISTORY).read_bytes().count(b"killed") > 1


def test_the_next_movement_heals_a_torn_line(tmp_path: Path, artifacts: dict[str, Path]) -> None:
    registry, (one, two, _) = filled(str(tmp_path), artifacts)
    with (tmp_path / HISTORY).open("ab") as file:
        file.write(encode_movement(movement("promote", two))[:-1])
    registry.move("promote", one, by="ann", why="first")
    assert [m.version for m in registry.history()[3:]] == [one]
    assert pointers(str(tmp_path)) == roles(one)


def test_a_publication_that_was_killed_leaves_nothing_in_the_way(tmp_path: Path, artifacts: dict[str, Path]) -> None:
    (tmp_path / "incoming").mkdir()
    (tmp_path / "incoming" / MANIFEST).write_text("half")
    _, versions = filled(str(tmp_path), artifacts)
    assert {path.name for path in (tmp_path / "versions").iterdir()} == {*versions}


def test_movements_at_once_are_made_one_after_the_other(tmp_path: Path, artifacts: dict[str, Path]) -> None:
    registry, versions = filled(str(tmp_path), artifacts)
    registry.move("promote", versions[0], by="ann", why="first")
    start = threading.Barrier(6)

    def promote(version: str) -> bool:
        start.wait()
        try:
            Registry(str(tmp_path)).move("promote", version, by="ann", why="at once")
        except RegistryError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(promote, versions * 2))
    state = registry.state()  # which raises for a history that cannot be
    assert sum(done) == len(registry.history()) - 4
    assert pointers(str(tmp_path)) == roles(*reversed(state.line[-2:]))


def test_one_of_two_rollbacks_is_refused(tmp_path: Path, artifacts: dict[str, Path]) -> None:
    """Two people see the same bad version; together they go back by one."""
    registry, versions = filled(str(tmp_path), artifacts)
    for version in versions:
        registry.move("promote", version, by="ann", why="a test")
    start = threading.Barrier(2)

    def rollback(_: int) -> str:
        start.wait()
        try:
            Registry(str(tmp_path)).move("rollback", versions[2], by="ann", why="bad")
        except RegistryError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        assert sorted(map(bool, pool.map(rollback, range(2)))) == [False, True]
    assert pointers(str(tmp_path)) == roles(versions[1], versions[0])


def test_readers_see_whole_pointers_only(tmp_path: Path, artifacts: dict[str, Path]) -> None:
    registry, versions = filled(str(tmp_path), artifacts)
    registry.move("promote", versions[0], by="ann", why="first")
    done = threading.Event()

    def read() -> set[str]:
        seen = set()
        while not done.is_set():
            seen.add(decode_pointer((tmp_path / "current").read_bytes(), "current").version)
        return seen

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for turn in range(1, 10):
            registry.move("promote", versions[turn % 3], by="ann", why="w" * (turn * 50))
        done.set()
        assert reader.result() <= {*versions}


def test_a_bucket_that_is_being_changed_says_by_whom(artifacts: dict[str, Path]) -> None:
    registry, (one, *_) = filled("memory://locked", artifacts)
    with (
        registry._place.lock("move"),
        pytest.raises(RegistryError, match=r"changed by process \d+ on .* remove memory://locked/move.lock"),
    ):
        Registry("memory://locked").move("promote", one, by="ann", why="first")
    registry.move("promote", one, by="ann", why="the lock is free again")
    fsspec.filesystem("memory").rm("/locked", recursive=True)


def test_a_held_lock_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = pytest.raises(DeployError, match=r"is held by process \d+ on .* since 20")
    with exclusive(path, wait=False), held, exclusive(path, wait=False):
        raise AssertionError
    with exclusive(path, wait=False):
        pass
