"""Which form is taken and why, and how its KV cache divides a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from proto.manifest import NATIVE_GRAPH, FileEntry, Manifest
from serve import forms
from serve.block_cache import BLOCK
from serve.choices import Choices, SettingsError, choose, kv_budget
from serve.native import NativeUnavailable
from serve.native_runner import block_shape
from serve.settings import Settings
from tests.serve.fakes import manifest

CONTEXT = 1000


def native_manifest() -> Manifest:
    return msgspec.structs.replace(manifest(), files={NATIVE_GRAPH: FileEntry(sha256="0" * 64, size_bytes=1)})


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(forms, "library", lambda: Path("operators.so"))
    monkeypatch.setattr(forms, "instruction_set", lambda path: "avx2")
    return Path("operators.so")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def library() -> Path:
        raise NativeUnavailable("no C++ compiler")

    monkeypatch.setattr(forms, "library", library)


def test_native_is_taken_where_it_can(built: Path) -> None:
    for wanted in ("auto", "native"):
        assert forms.pick(wanted, native_manifest()) == forms.NativeForm("native operators on avx2", built)
    assert forms.pick("stock", native_manifest()).phrase == "stock graph: --form stock"


def test_an_artifact_without_a_native_graph(built: Path) -> None:
    assert forms.pick("auto", manifest()).phrase == f"stock graph: the artifact has no {NATIVE_GRAPH}"
    with pytest.raises(SettingsError, match="--form native cannot be met: the artifact has no"):
        forms.pick("native", manifest())


@pytest.mark.usefixtures("no_compiler")
def test_a_machine_without_a_compiler() -> None:
    assert forms.pick("auto", native_manifest()).phrase == "stock graph: no C++ compiler"
    with pytest.raises(SettingsError, match="no C\\+\\+ compiler; use --form auto or stock"):
        forms.pick("native", native_manifest())


def chosen(wanted: str, **options: Any) -> Choices:
    settings = Settings(model=Path("x"), max_context=CONTEXT, **options)
    return choose(settings, native_manifest(), forms.pick(wanted, native_manifest()), kv_budget(settings))


@pytest.mark.usefixtures("built")
def test_a_budget_becomes_blocks_or_slots() -> None:
    layers, kv_heads, size = block_shape(manifest().architecture)
    native = chosen("native", kv_budget_mib=1)
    assert (native.block.tokens, native.block.bytes) == (BLOCK, layers * kv_heads * size)
    assert native.num_blocks == (1 << 20) // native.block.bytes
    assert native.kv_bytes <= 1 << 20
    assert chosen("native", kv_budget_mib=1, slots=500).num_slots == 500  # they share the blocks
    stock = chosen("stock", kv_budget_mib=1)
    assert (stock.block.tokens, stock.num_slots, stock.num_blocks) == (CONTEXT, 32, 32)


@pytest.mark.usefixtures("built")
def test_a_budget_too_small_for_one_request_is_refused() -> None:
    big = msgspec.structs.replace(
        native_manifest(), architecture=msgspec.structs.replace(manifest().architecture, num_layers=100)
    )
    settings = Settings(model=Path("x"), max_context=CONTEXT, kv_budget_mib=1)
    with pytest.raises(SettingsError, match=r"1 slots of 1000 tokens need \d+ MiB .* larger --kv-budget-mib"):
        choose(settings, big, forms.pick("native", big), kv_budget(settings))
