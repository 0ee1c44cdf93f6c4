"""Read conversations, in the form of OpenAI or of ShareGPT, as messages for a chat template."""

import json
from contextlib import suppress
from typing import Any

from cli.errors import require

ROLES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")
SHARE_GPT_ROLES = ROLES | {"observation": "tool", "function": "tool", "function_call": "assistant"}


def is_messages(value: Any) -> bool:
    """Return whether a value looks like a conversation: a list of dicts with the key role or from."""
    is_list = isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
    return is_list and ("role" in value[0] or "from" in value[0])


def read_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Return a conversation as messages with role and content. Raise UserError, which starts with ``name``."""
    require(isinstance(value, list) and bool(value), f"{name} has no messages. Remove it.")
    return [_read_message(message, f"{name}: message {i}") for i, message in enumerate(value, 1)]


def _read_message(message: Any, name: str) -> dict[str, Any]:
    require(isinstance(message, dict), f"{name} is {str(message)[:40]!r}. Use a dict with the keys role and content.")
    given = {key: value for key, value in message.items() if value is not None}
    keys, roles = ", ".join(map(str, given)) or "none", SHARE_GPT_ROLES if given.keys() & {"from", "value"} else ROLES
    role, content = given.pop("role", given.pop("from", None)), given.pop("content", given.pop("value", None))
    calls = given.pop("tool_calls", None) or []  # some templates render an empty list as a call
    if isinstance(content, list):
        kinds = [str(part.get("type") if isinstance(part, dict) else part)[:40] for part in content]
        others = ", ".join({kind: 0 for kind in kinds if kind != "text"})
        require(not others, f"{name} has content of type {others}. Use parts of type text only, or remove the record.")
        content = "".join(str(part.get("text") or "") for part in content)
    has_content = isinstance(content, str) or (content is None and bool(calls))
    lacks = f"{name} lacks a role or content that is text; its keys are: {keys}"
    require(isinstance(role, str) and bool(role) and has_content, f"{lacks}. Set both, or remove the record.")
    read = {"role": roles.get(role, role)} | ({} if content is None else {"content": content}) | given
    return read | ({"tool_calls": [_read_call(call, name) for call in calls]} if calls else {})


def _read_call(call: Any, name: str) -> dict[str, Any]:
    """Return a tool call in OpenAI's form. Decode arguments that are the JSON of a dict: templates encode them."""
    function = (call.get("function") or call) if isinstance(call, dict) else None
    is_call = isinstance(function, dict) and isinstance(function.get("name"), str)
    require(is_call, f"{name} has a tool call without a function name. Set the keys name and arguments of function.")
    with suppress(TypeError, ValueError):
        arguments = json.loads(function.get("arguments"))
        function = function | ({"arguments": arguments} if isinstance(arguments, dict) else {})
    return (call if call.get("function") else {"type": "function"}) | {"function": function}
