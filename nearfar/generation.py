"""Text generation in words that engines, the wire and the client share."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "stop_string", "cancelled", "deadline"]


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: Plain text.
    """

    role: str
    content: str


class GenerationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer is sampled and where it ends.

    Attributes:
        max_new_tokens: Upper bound of the answer.
        temperature: 0 decodes greedily (the default, and reproducible).
        top_p: Nucleus sampling; 1 turns it off.
        top_k: Candidates per token; 0 turns it off.
        repetition_penalty: 1 turns it off.
        seed: Makes sampling reproducible on one engine; `None` draws a fresh one.
        stop: Strings that end the answer; they are not part of it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """What to continue: either raw text, or a conversation for the model's chat template.

    Attributes:
        text: Raw prompt; exclusive with `messages`.
        messages: Conversation; rendered by the engine with the bundle's chat template.
        answer_so_far: Text the model is taken to have answered already; generation continues it
            and returns only what follows (used when another route died mid-answer).
    """

    text: str | None = None
    messages: tuple[ChatMessage, ...] = ()
    answer_so_far: str = ""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int


class GenerationChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of an answer as it comes out of the engine.

    Attributes:
        index: Position of the token in this generation, from 0, without gaps. The last chunk
            carries the number of tokens as its index, `finish_reason` and `usage`; its text is
            what the stop-string check had held back (often empty).
        text: Decoded text; empty while a multi-token character is incomplete.
        finish_reason: Set on the last chunk only.
        usage: Set on the last chunk only.
    """

    index: int
    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
