"""Render a conversation with the model's own chat template.

`jinja2` is used rather than onnxruntime-genai's `apply_chat_template`: that is a partial
re-implementation of the language, which differs between versions, while models are trained on what
jinja2 renders. The sandbox is needed because a template is a program that comes with a model.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nearfar.errors import BundleError, InvalidInput
from nearfar.generation import ChatMessage

_ROLES = ("system", "user", "assistant")

#: Tokens templates may name, as keys of ``tokenizer_config.json``.
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """The chat template of a model folder.

    Args:
        folder: Holds ``chat_template.jinja``, or ``tokenizer_config.json`` with `chat_template`.
        label: Model and variant, for error texts.

    Raises:
        BundleError: A file is not JSON, or the template does not parse.
    """

    def __init__(self, folder: Path, *, label: str) -> None:
        self._label = label
        config = _read_config(folder / "tokenizer_config.json")
        self._tokens = {name: _token_text(config.get(name)) for name in _TOKENS}
        source = _template_source(folder, config)
        self._template: jinja2.Template | None = None
        if source is not None:
            try:
                self._template = _environment().from_string(source)
            except jinja2.TemplateError as exc:
                raise BundleError(
                    f"The chat template of {label} does not parse: {exc}",
                    fix="Convert the model again from a source with a working template",
                ) from exc

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt for the assistant's next turn.

        Raises:
            InvalidInput: There is no template, a role is unknown, or the template refuses the
                conversation.
        """
        if self._template is None:
            raise InvalidInput(
                f"{self._label} has no chat template, it continues plain text only",
                field="messages",
                fix="Give the prompt as text",
            )
        for position, message in enumerate(messages):
            if message.role not in _ROLES:
                raise InvalidInput(
                    f"Message {position} has the role {message.role!r}",
                    field="messages",
                    fix=f"Use one of: {', '.join(_ROLES)}",
                )
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._tokens)
        except (jinja2.TemplateError, TypeError) as exc:
            raise InvalidInput(
                f"The chat template of {self._label} refuses this conversation: {exc}",
                field="messages",
                fix="Let user and assistant take turns, beginning with the user",
            ) from exc


def _environment() -> ImmutableSandboxedEnvironment:
    # The settings and helpers that transformers gives to templates, which are written for them.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes HTML, which prompts must not be.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as exc:
        raise BundleError(f"{path} is not JSON ({exc})", fix="Convert the model again") from exc
    return config if isinstance(config, dict) else {}


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    stated = config.get("chat_template")
    if isinstance(stated, list):  # several named ones: [{"name": "default", "template": …}, …]
        named = {item.get("name"): item.get("template") for item in stated}
        stated = named.get("default")
    return stated if isinstance(stated, str) else None


def _token_text(token: object) -> str:
    """Tokens are written plainly or as ``{"content": …}``."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
