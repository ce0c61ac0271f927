"""`python -m deploy`: what each command does and says."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deploy import signatures
from deploy.__main__ import COMMANDS, EXIT_USAGE, main
from deploy.commands import Fetch, fetch
from deploy.registry import Registry
from proto.manifest import WEIGHTS, load
from proto.registry import RegistryError, version_folder

Deploy = Callable[..., tuple[int, str, str]]


@pytest.fixture
def deploy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Deploy:
    """Run a command on the registry below tmp_path: (exit status, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deploy", *words, "--registry", str(tmp_path / "registry")])
        code = main()
        return code, *capsys.readouterr()

    return run


def make_keys(directory: Path, name: str) -> tuple[str, str]:
    """(private, public) PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = directory / f"{name}.pem", directory / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return str(private), str(public)


def test_a_versions_life(deploy: Deploy, artifacts: dict[str, Path], tmp_path: Path) -> None:
    one, two, _ = artifacts
    said = f"{artifacts[one]} is version {one} of {tmp_path / 'registry'}\n"
    assert deploy("publish", str(artifacts[one]))[:2] == (0, said)
    code, shown, _ = deploy("promote", one[:8], "--by", "ann", "--why", "the first")
    assert code == 0
    assert shown.startswith(f"current   {one[:12]}, since ")
    assert shown.endswith(" by ann: the first\n")
    code, shown, _ = deploy("publish", str(artifacts[two]), "--share", "0.25")
    assert f"candidate {two[:12]} with 25% of the traffic" in shown
    assert "candidate " + two[:12] + " with 50%" in deploy("trial", "--share", "0.5")[1]
    assert f"previous  {one[:12]}" in deploy("promote")[1]
    assert f"current   {one[:12]}" in deploy("rollback", two)[1]
    code, _, error = deploy("rollback", two)
    assert (code, error) == (EXIT_USAGE, f"deploy: version {two[:12]} is not current, so it cannot be rolled back\n")
    assert "candidate" in deploy("trial", two)[1]
    assert "candidate" not in deploy("reject")[1]
    actions = [line.split("  ")[1].split()[0] for line in deploy("history")[1].splitlines()[:9]]
    assert actions == ["publish", "promote", "publish", "canary", "canary", "promote", "rollback", "canary", "reject"]
    assert deploy("verify")[:2] == (0, "".join(sorted(f"{name[:12]} is whole\n" for name in (one, two))))


def test_a_damaged_version_is_neither_promoted_nor_gone_back_to(
    deploy: Deploy, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    one, two, _ = artifacts
    for version in (one, two):
        deploy("publish", str(artifacts[version]))
        deploy("promote", version)
    weights = tmp_path / "registry" / version_folder(one) / WEIGHTS
    weights.chmod(0o600)
    weights.write_text("else")
    for words in (["rollback"], ["promote", one], ["trial", one], ["verify"]):
        code, _, error = deploy(*words)
        assert code == EXIT_USAGE
        assert f"version {one[:12]} is damaged" in error
    assert Registry(str(tmp_path / "registry")).state().current == two


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["promote"], "has no candidate version"),
        (["rollback"], "has no current version"),
        (["reject"], "has no candidate version"),
        (["history"], "nothing was ever published to"),
        (["verify"], "nothing was ever published to"),
        (["promote", "abcd"], "abcd is not a version of"),
        (["publish", "nowhere"], "nowhere is not an artifact"),
        (["trial", "--share", "2"], "--share 2 is out of range; give at most 1"),
    ],
)
def test_what_cannot_be_done_is_said(words: list[str], message: str, deploy: Deploy) -> None:
    code, shown, error = deploy(*words)
    assert (code, shown) == (EXIT_USAGE, "")
    assert error.startswith("deploy: ")
    assert message in error


def test_signed_versions(deploy: Deploy, artifacts: dict[str, Path], tmp_path: Path) -> None:
    one, two, _ = artifacts
    private, public = make_keys(tmp_path, "ann")
    _, other = make_keys(tmp_path, "eve")
    assert deploy("publish", str(artifacts[one]), "--key", private)[1].endswith(", signed\n")
    deploy("publish", str(artifacts[two]))
    assert deploy("promote", one, "--public-key", public)[0] == 0
    assert f"not signed with {other}" in deploy("verify", one, "--public-key", other)[2]
    assert "is not signed; publish it again with --key" in deploy("trial", two, "--public-key", public)[2]
    code, shown, error = deploy("verify", "--public-key", public)
    assert (code, shown) == (EXIT_USAGE, f"{one[:12]} is whole and signed with {public}\n")
    assert error.count("is not signed") == 1
    assert "cannot sign" in deploy("publish", str(artifacts[one]), "--key", public)[2]


def test_another_versions_signature_does_not_count(artifacts: dict[str, Path], tmp_path: Path) -> None:
    one, two, _ = artifacts
    private, public = make_keys(tmp_path, "ann")
    signature = signatures.sign(artifacts[one], Path(private))
    signatures.check(artifacts[one], signature, Path(public))
    with pytest.raises(RegistryError, match="is not signed with"):
        signatures.check(artifacts[two], signature, Path(public))
    with pytest.raises(RegistryError, match="is not signed with"):
        signatures.check(artifacts[one], b"{}", Path(public))


def test_signing_without_the_package_names_the_cure(
    deploy: Deploy, artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    monkeypatch.delitem(sys.modules, "model_signing.signing", raising=False)
    private, _ = make_keys(tmp_path, "ann")
    code, _, error = deploy("publish", str(next(iter(artifacts.values()))), "--key", private)
    assert code == EXIT_USAGE
    assert "signatures need model-signing" in error
    assert "pip install -r requirements/deploy.txt" in error


def test_every_command_is_the_modules() -> None:
    modules = {module for module, _ in COMMANDS.values()}
    assert {name for module in modules for name in importlib.import_module(module).COMMANDS} == COMMANDS.keys()


def test_fetch_copies_a_version_whole(artifacts: dict[str, Path], url: str, tmp_path: Path) -> None:
    version, artifact = next(iter(artifacts.items()))
    registry = Registry(url)
    registry.publish(artifact, by="ann", why="test")
    registry.move("promote", version, by="ann", why="test")
    output = tmp_path / "fetched" / "model"
    output.parent.mkdir()
    (output.parent / ".model.new").mkdir()  # what a killed process left
    assert fetch(Fetch(registry=url, output=output)) == 0
    assert load(output).digest == version
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    with pytest.raises(RegistryError, match="is there already"):
        fetch(Fetch(registry=url, output=output))
