"""The documentation held to the code, in both directions; the README's snippets run against a real server."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shlex
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest

from compress import generations, speed
from compress.__main__ import parser as compress_parser
from compress.budget import KINDS, STRICT, WIDE, parse
from compress.corpus import DOCUMENT_CHARACTERS
from compress.families import FAMILIES
from compress.reading import CHUNK
from compress.recipes import RECIPES
from compress.scores import FIGURES, REFERENCE_FIGURES
from deploy.__main__ import COMMANDS as DEPLOY_COMMANDS
from deploy.__main__ import parser as deploy_parser
from monitoring.__main__ import parser as monitoring_parser
from proto import inference_pb2 as pb
from proto.manifest import CHAT_TEMPLATE, GRAPH, MANIFEST, NATIVE_GRAPH, REPORT, TOKENIZER, WEIGHTS
from serve import api, errors, http_limits
from serve.grpc_api import CODES, NAME
from serve.http_api import OPEN, HttpApi
from serve.parsing import UNSUPPORTED
from serve.records_command import parser as records_parser
from serve.settings import Settings, flag
from tests.serve.tiny import Server, make_artifact, start_server, stop_server
from train.__main__ import COMMANDS as TRAIN_COMMANDS
from train.__main__ import parser as train_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SERVING = (ROOT / "docs/serving.md").read_text()
COMPRESS = (ROOT / "docs/compress.md").read_text()
TRAIN = (ROOT / "docs/train.md").read_text()
RECORDS = (ROOT / "docs/records.md").read_text()
DEPLOY = (ROOT / "docs/deploy.md").read_text()
MONITORING = (ROOT / "docs/monitoring.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PAGES = {
    "README.md": README,
    "docs/serving.md": SERVING,
    "docs/compress.md": COMPRESS,
    "docs/train.md": TRAIN,
    "docs/deploy.md": DEPLOY,
    "docs/monitoring.md": MONITORING,
    "docs/records.md": RECORDS,
    "docs/cuda.md": (ROOT / "docs/cuda.md").read_text(),
    "docs/runbook.md": (ROOT / "docs/runbook.md").read_text(),
}
CALLS = {
    "Generation": (api.Generate, api.Generate),
    "Completions": (api.CompletionRequest, api.Generate),
    "Chat": (api.ChatRequest, api.Generate),
    "Embeddings": (api.EmbeddingRequest, None),
    "Tokenize": (api.TokenizeRequest, None),
    "Detokenize": (api.DetokenizeRequest, None),
    "Feedback": (api.FeedbackRequest, None),
}


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |^\1 |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"no heading {title!r}"
    return found[2]


def rows(text: str) -> list[list[str]]:
    """The cells of the first table, without its head. `\\|` is no border."""
    lines = [line for line in text.split("\n\n| ", 1)[-1].split("\n\n")[0].splitlines() if "|" in line]
    assert set(lines[1]) == set("|-"), "no table"
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines[2:]]


def quoted(text: str) -> list[str]:
    """The words in code type, outside fences."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def fences(language: str) -> list[str]:
    """The README's, with the lines that a backslash breaks joined."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text.replace("\\\n", "") for text in found]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))


def subcommands(parser: argparse.ArgumentParser, group: str = "") -> dict[str, argparse.ArgumentParser]:
    """Name -> parser; those of a group of commands as `GROUP NAME`."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                found |= subcommands(command, f"{group}{name} ") or {group + name: command}
    return found


# Room -> its page, and its commands.
COMMANDS = {
    "compress": (COMPRESS, subcommands(compress_parser())),
    "train": (TRAIN, subcommands(train_parser(*TRAIN_COMMANDS))),
    "serve records": (RECORDS, subcommands(records_parser())),
    "deploy": (DEPLOY, subcommands(deploy_parser(*DEPLOY_COMMANDS))),
    "monitoring": (MONITORING, subcommands(monitoring_parser())),
}


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    actions = [action for action in parser._actions if action.dest != "help"]
    return {name for action in actions for name in action.option_strings or (action.dest,)}


def serve_flags() -> set[str]:
    names = {flag(item.name) for item in fields(Settings)}
    return names | {"--no-" + flag(item.name)[2:] for item in fields(Settings) if item.metadata["parse"] is bool}


# -- docs/serving.md ------------------------------------------------------------------------------------------------


def test_every_flag_of_the_server_is_documented_with_its_default() -> None:
    table = rows(section(SERVING, "Flags"))
    assert {name for row in table for name in quoted(row[0])} == serve_flags()
    shown = {quoted(row[0])[0]: row[1] for row in table}
    for item in fields(Settings):
        if item.default not in ("", None):
            assert shown[flag(item.name)] == f"`{item.default}`"


def test_every_endpoint_is_documented() -> None:
    routes = HttpApi(None, Settings(model=Path("x"))).routes  # type: ignore[arg-type]
    documented = {(quoted(row[0])[0], quoted(row[1])[0]) for row in rows(section(SERVING, "HTTP"))}
    assert documented == {(method, path) for path, (method, _) in routes.items()}
    (line,) = (line for line in SERVING.splitlines() if line.startswith("With a key set, every path but"))
    assert set(quoted(line.split("requires")[0])) == OPEN


def test_every_grpc_method_is_documented() -> None:
    methods = pb.DESCRIPTOR.services_by_name["Inference"].methods
    documented = {(quoted(row[0])[0], row[1]) for row in rows(section(SERVING, "gRPC"))}
    assert documented == {(m.name, "stream" if m.server_streaming else "one") for m in methods}
    assert f"`{NAME}`" in SERVING


def numbers(schema: Any, definitions: dict[str, Any]) -> Iterator[float]:
    """The limits in a JSON schema, but for those that only say "32 or 64 bits"."""
    if isinstance(schema, list):
        for item in schema:
            yield from numbers(item, definitions)
    elif isinstance(schema, dict):
        if "$ref" in schema:
            yield from numbers(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        for key, value in schema.items():
            if key in ("minimum", "maximum", "exclusiveMinimum") or key.startswith(("maxI", "maxL", "maxP", "minL")):
                yield from [value] if abs(value) < 2**31 - 1 else []
            elif key not in ("default", "enum", "required"):
                yield from numbers(value, definitions)


@pytest.mark.parametrize("title", CALLS)
def test_every_parameter_is_documented_with_its_default_and_limits(title: str) -> None:
    call, shared = CALLS[title]
    table = {quoted(row[0])[0]: row for row in rows(section(SERVING, title))}
    names = set(call.__struct_fields__)
    if shared not in (None, call):
        names -= set(shared.__struct_fields__)
    assert table.keys() == names
    (schema,), definitions = msgspec.json.schema_components([call])
    del schema
    for name, row in table.items():
        described = definitions[call.__name__]["properties"][name]
        default = f"`{json.dumps(described['default'])}`" if "default" in described else "required"
        assert row[1] == default, name
        wanted = {f"{abs(number):g}" for number in numbers(described, definitions)}
        assert wanted <= {f"{float(found):g}" for found in re.findall(r"\d+", row[2])}, name


def test_every_refused_parameter_is_documented_with_what_is_let_through() -> None:
    table = rows(section(SERVING, "Known elsewhere, refused here"))
    documented = {quoted(row[0])[0]: [json.loads(value) for value in quoted(row[1])] for row in table}
    assert documented == {name: list(values) for name, values in UNSUPPORTED.items()}


def test_every_error_is_documented_with_its_codes() -> None:
    def tree(kind: type[errors.PawlError]) -> Iterator[type[errors.PawlError]]:
        for child in kind.__subclasses__():
            if child.__module__ in (errors.__name__, http_limits.__name__):
                yield child
                yield from tree(child)

    expected = {
        kind.__name__: (str(kind.status), f"`{kind.kind}`", f"`{CODES[kind].name}`" if kind in CODES else "none")
        for kind in tree(errors.PawlError)
    }
    table = rows(section(SERVING, "Errors"))
    assert {quoted(row[0])[0]: tuple(row[1:4]) for row in table} == expected
    assert f"{http_limits.MAX_LINE_BYTES} bytes" in SERVING


# -- docs/compress.md -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "name"), [(room, name) for room, (_, found) in COMMANDS.items() for name in found])
def test_every_flag_of_a_command_is_documented_with_its_default(room: str, name: str) -> None:
    page, found = COMMANDS[room]
    command = found[name]
    table = rows(section(page, name))
    assert {word for row in table for word in quoted(row[0])} == flags_of(command)
    for row in table:
        (action,) = (
            a for a in command._actions if {*a.option_strings, a.dest} & {quoted(row[0])[0]} and a.dest != "help"
        )
        required = action.required and action.default is None and action.nargs != "*"
        default = " ".join(action.default) if isinstance(action.default, tuple) else action.default
        if required:
            assert row[1] == "required", row[0]
        elif isinstance(default, bool):
            assert row[1] in (("on",) if default else ("off", "")), row[0]
        elif default not in ("", None, 0):
            assert row[1] == f"`{str(default).removeprefix(f'{ROOT}/')}`", row[0]


def test_every_command_recipe_and_family_is_documented() -> None:
    headings = set(re.findall(r"^## ([a-z-]+)$", COMPRESS, re.MULTILINE))
    assert headings == COMMANDS["compress"][1].keys()
    assert COMMANDS["deploy"][1].keys() <= set(re.findall(r"^## ([a-z -]+)$", DEPLOY, re.MULTILINE))
    assert COMMANDS["train"][1].keys() <= set(re.findall(r"^## ([a-z-]+)$", TRAIN, re.MULTILINE))
    assert [quoted(row[0])[0] for row in rows(section(COMPRESS, "Recipes"))] == list(RECIPES)
    assert [quoted(row[0])[0] for row in rows(section(COMPRESS, "Families"))] == list(FAMILIES)


def test_the_gates_figures_and_limits_are_documented() -> None:
    text = section(COMPRESS, "The gate")
    table = {name: quoted(row[1]) for row in rows(text) for name in quoted(row[0])}
    assert table.keys() == {*FIGURES, *REFERENCE_FIGURES, *generations.figures([(1, 1)]).metrics}
    assert {name: shown for name, shown in table.items() if shown} == {
        kind.metric: [kind.example] for kind in KINDS.values()
    }
    assert [row[1] for row in rows(text.split("**Limits**")[1])] == [f"`{STRICT}`", f"`{WIDE}`"]
    assert f"first {generations.PROMPT} tokens of each window, by {generations.LENGTH} tokens" in text
    assert f"tokens per second of {speed.STREAMS} (median steps at a context of {speed.CONTEXT} tokens)" in text
    assert f"chunks of {CHUNK} tokens" in COMPRESS
    assert f"(a step of {speed.STREAMS})" in section(COMPRESS, "search")
    assert f"documents of {DOCUMENT_CHARACTERS} characters" in COMPRESS
    limits = parse(STRICT).thresholds
    ratio, kl, agreement = (limits[name] for name in ("perplexity_ratio", "kl", "greedy_agreement"))
    for figure in (f"{100 * (ratio - 1):.3g} %", f"{kl:g} nats", f"{100 * agreement:g} %"):
        assert figure in section(README, "Your own model")


# -- README.md, and what all pages name -----------------------------------------------------------------------------


def test_every_target_is_in_the_readme() -> None:
    named = set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join([*quoted(README), *fences("sh")])))
    assert named == targets()


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_path_and_target_that_a_page_names_exists(page: str) -> None:
    text = PAGES[page]
    code = "\n".join([*quoted(text), *fences("sh")])
    known = serve_flags() | {"--no-deps", "--nproc-per-node", "--collector"}  # pip's, torchrun's and node_exporter's
    known |= {name for _, found in COMMANDS.values() for command in found.values() for name in flags_of(command)}
    assert set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", code)) <= known
    routes = HttpApi(None, Settings(model=Path("x"))).routes  # type: ignore[arg-type]
    assert set(re.findall(r"(?:^|(?<=:8000))/[a-z0-9][\w/{}]*", code, re.MULTILINE)) <= routes.keys()
    assert set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE)) <= targets()
    for room in re.findall(r"python -m (?!pip\b)(\w+)", code):
        assert (ROOT / room / "__main__.py").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_links_and_file_names_lead_somewhere(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGES[page]) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
    named = [
        name
        for name in quoted(PAGES[page])
        if re.fullmatch(r"(proto|train|compress|serve|deploy|bench|tests)/[\w./]+", name)
    ]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_map_of_folders_is_the_tree() -> None:
    text = section(README, "The folders")
    here = {quoted(row[0])[0] for row in rows(text)}
    (line,) = (line for line in text.splitlines() if line.startswith("Not here yet"))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    paths = tracked.splitlines() or [str(p.relative_to(ROOT)) for p in ROOT.glob("[!.]*/*") if p.is_file()]
    present = {path.split("/")[0] + "/" for path in paths if "/" in path and not path.startswith(".")}
    assert here == present
    assert set(quoted(line)) & ({*paths} | present) == set()


def test_the_readme_names_the_artifacts_files() -> None:
    files = {GRAPH, NATIVE_GRAPH, WEIGHTS, TOKENIZER, CHAT_TEMPLATE, REPORT, MANIFEST}
    assert files <= set(quoted(section(README, "Your own model")))
    assert files == {name for row in rows(section(COMPRESS, "The artifact")) for name in quoted(row[0])}
    assert f"`{re.findall(r'^MODEL .?= (.*)$', MAKEFILE, re.MULTILINE)[0]}`" in README


def test_the_readme_is_short_and_has_room_for_the_table() -> None:
    assert README.count("\n") < 200
    assert len(re.findall(r"^<!-- bench -->\n.+?^<!-- /bench -->$", README, re.DOTALL | re.MULTILINE)) == 1


@pytest.mark.parametrize("number", range(len(fences("sh"))))
def test_shell_snippets_parse(number: int) -> None:
    done = subprocess.run(["sh", "-n"], input=fences("sh")[number], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("number", range(len(fences("sh"))))
def test_commands_of_ours_are_understood(number: int) -> None:
    """The arguments of `python -m compress`, `train` and `deploy` go through their parsers."""
    parsers = {
        "compress": compress_parser(),
        "train": train_parser(*TRAIN_COMMANDS),
        "deploy": deploy_parser(*DEPLOY_COMMANDS),
    }
    for line in fences("sh")[number].splitlines():
        words = shlex.split(line)
        if words[1:2] == ["-m"] and words[2] in parsers:
            parsers[words[2]].parse_args(words[3:])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("docs")
    running = start_server(make_artifact(root), root / "records.sqlite")
    yield running
    assert stop_server(running) == 0


@pytest.mark.parametrize("number", range(len(fences("python"))))
def test_python_snippets_run(number: int, server: Server) -> None:
    snippet = fences("python")[number]
    moved = snippet.replace("http://127.0.0.1:8000", server.http_url).replace("127.0.0.1:50051", server.grpc_address)
    assert moved != snippet
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(moved, "README.md", "exec"), {})
    assert shown.getvalue().strip()


def test_the_curl_snippet_is_answered(server: Server) -> None:
    (snippet,) = (fence for fence in fences("sh") if fence.startswith("curl"))
    _, url, _, header, _, body = shlex.split(snippet.replace("http://127.0.0.1:8000", server.http_url))
    request = urllib.request.Request(url, body.encode(), dict([header.split(": ")]))
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_the_ready_line_is_the_servers(server: Server) -> None:
    """Word for word, but for the numbers, the name and the reasons."""

    def shape(line: str) -> str:
        line = re.sub(r"\([^)]*\)", "()", " ".join(line.split()))
        return re.sub(r"(?<=serve )\S+", "NAME", re.sub(r"\d+(\.\d+)*", "0", line))

    assert shape(fences("text")[0]) == shape(server.first_line)
