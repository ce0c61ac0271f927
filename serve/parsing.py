"""From untrusted bytes or fields to a struct, with every way to fail told as InvalidRequest."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from serve.errors import InvalidRequest

T = TypeVar("T", bound=Struct)

# Parameters that other servers know and we do not, with the values that change nothing and are let through.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "dimensions": (),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),  # in chat
    "episode_id": (),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": ("",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (True, False),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # without tools, both mean nothing
    "prediction": (),
    "priority": (0,),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "prompt_logprobs": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

_NAMED = re.compile(r"(missing required|contains unknown) field `(.*)`", re.DOTALL)
_STEP = re.compile(r"([^.\[\]]+)")
MAX_SHOWN = 60  # characters of a client's value in our message


def parse_fields(struct_type: type[T], body: bytes | dict[str, Any]) -> T:
    """Make a struct from a JSON body or from plain fields. Raises InvalidRequest that names the field."""
    fields = decode(body) if isinstance(body, bytes) else body
    # Clients spell "not given" as null, also inside the messages that they got from us and send back.
    fields = {name: value for name, value in fields.items() if value is not None}
    if isinstance(messages := fields.get("messages"), list):
        fields["messages"] = [_without_nulls(message) for message in messages]
    for name in [name for name in fields if name not in struct_type.__struct_fields__]:
        if any(type(value) is type(fields[name]) and value == fields[name] for value in UNSUPPORTED.get(name, ())):
            del fields[name]
        elif name in UNSUPPORTED:
            raise InvalidRequest(f"{name} is not supported by this server; leave it out", param=name)
        else:
            raise InvalidRequest(f"{show(name)} is not a parameter of this call; leave it out", param=name[:MAX_SHOWN])
    try:
        return msgspec.convert(fields, struct_type, str_keys=True)
    except msgspec.ValidationError as error:
        raise _explain(str(error), fields) from error
    except (RecursionError, OverflowError) as error:
        raise InvalidRequest(f"the request is not understood: {error}") from error


def decode(body: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises InvalidRequest."""
    try:
        fields = msgspec.json.decode(body)
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object")
    return fields


def show(value: Any) -> str:
    """A client's value, safe and short enough for a message."""
    if isinstance(value, list | dict):
        return f"a list of {len(value)}" if isinstance(value, list) else f"an object of {len(value)}"
    text = repr(value[: MAX_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def _without_nulls(value: Any) -> Any:
    return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value


def _explain(text: str, fields: dict[str, Any]) -> InvalidRequest:
    """Our error from msgspec's text, such as "Expected `float` <= 2.0 - at `$.temperature`"."""
    problem, at, where = text.rpartition(" - at ")
    problem, path = (problem, where.removeprefix("`key` in ").strip("`").lstrip("$.")) if at else (text, "")
    if named := _NAMED.search(problem):
        at = f"{path}.{named[2]}" if path else named[2]
        problem = "is required" if named[1] == "missing required" else "is not a known field; leave it out"
        return InvalidRequest(f"{at} {problem}", param=_STEP.findall(at)[0])
    if not path:
        return InvalidRequest(problem)
    steps, value = _STEP.findall(path), fields
    for step in steps:
        if isinstance(value, list) and step.isdigit():
            value = value[int(step)]
        elif isinstance(value, dict) and step in value:
            value = value[step]
    problem = problem[:1].lower() + problem[1:].replace("`", "")
    return InvalidRequest(f"{path} is {show(value)}: {problem}", param=steps[0])
