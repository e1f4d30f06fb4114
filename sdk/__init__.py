"""The nearfar client: an answer from the nearest place that policy allows and the deadline needs.

    from sdk import Client

    with Client.from_config("nearfar.toml") as client:
        label = client.classify("file-type", Path("report.pdf"))
        for chunk in client.chat("assistant", [{"role": "user", "content": "…"}]):
            print(chunk.text, end="", flush=True)

Names are imported when they are first used, so importing this package costs next to nothing.
Reference: docs/reference/sdk.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nearfar.errors import (
        AgreementNotMet,
        BundleError,
        CalibrationError,
        Cancelled,
        CloudUnavailable,
        ConfigError,
        DeadlineExceeded,
        EngineError,
        InvalidInput,
        ModelNotFound,
        NearfarError,
        Overloaded,
        PolicyDenied,
        RemoteProtocolError,
        SecurityError,
        StreamInterrupted,
    )
    from nearfar.generation import ChatMessage, Usage
    from sdk.aio import AsyncClient
    from sdk.audio import AsyncAudioStream, AudioAnswer, AudioStream
    from sdk.client import Client
    from sdk.config import CloudConfig, Config
    from sdk.config_file import load_config
    from sdk.jobs import AsyncJob, GenerateResult, Job, JobsConfig
    from sdk.policy import Policy, load_policy, parse_policy
    from sdk.results import (
        Chunk,
        ClassifyResult,
        EmbedResult,
        InferResult,
        ModelInfo,
        Route,
        Timings,
    )
    from sdk.routing import RouteDecision, replay
    from sdk.sharing import CacheConfig
    from sdk.streams import AsyncGenerationStream, GenerationStream

_MODULE_OF = {
    **dict.fromkeys(
        (
            "AgreementNotMet", "BundleError", "CalibrationError", "Cancelled", "CloudUnavailable",
            "ConfigError", "DeadlineExceeded", "EngineError", "InvalidInput", "ModelNotFound",
            "NearfarError", "Overloaded", "PolicyDenied", "RemoteProtocolError", "SecurityError",
            "StreamInterrupted",
        ),
        "nearfar.errors",
    ),
    **dict.fromkeys(("ChatMessage", "Usage"), "nearfar.generation"),
    "AsyncClient": "sdk.aio",
    **dict.fromkeys(("AsyncAudioStream", "AudioAnswer", "AudioStream"), "sdk.audio"),
    "Client": "sdk.client",
    **dict.fromkeys(("CloudConfig", "Config"), "sdk.config"),
    "load_config": "sdk.config_file",
    **dict.fromkeys(("AsyncJob", "GenerateResult", "Job", "JobsConfig"), "sdk.jobs"),
    **dict.fromkeys(("Policy", "load_policy", "parse_policy"), "sdk.policy"),
    **dict.fromkeys(
        (
            "Chunk", "ClassifyResult", "EmbedResult", "InferResult", "ModelInfo", "Route",
            "Timings",
        ),
        "sdk.results",
    ),
    **dict.fromkeys(("RouteDecision", "replay"), "sdk.routing"),
    "CacheConfig": "sdk.sharing",
    **dict.fromkeys(("AsyncGenerationStream", "GenerationStream"), "sdk.streams"),
}  # fmt: skip

__all__ = [
    "AgreementNotMet",
    "AsyncAudioStream",
    "AsyncClient",
    "AsyncGenerationStream",
    "AsyncJob",
    "AudioAnswer",
    "AudioStream",
    "BundleError",
    "CacheConfig",
    "CalibrationError",
    "Cancelled",
    "ChatMessage",
    "Chunk",
    "ClassifyResult",
    "Client",
    "CloudConfig",
    "CloudUnavailable",
    "Config",
    "ConfigError",
    "DeadlineExceeded",
    "EmbedResult",
    "EngineError",
    "GenerateResult",
    "GenerationStream",
    "InferResult",
    "InvalidInput",
    "Job",
    "JobsConfig",
    "ModelInfo",
    "ModelNotFound",
    "NearfarError",
    "Overloaded",
    "Policy",
    "PolicyDenied",
    "RemoteProtocolError",
    "Route",
    "RouteDecision",
    "SecurityError",
    "StreamInterrupted",
    "Timings",
    "Usage",
    "load_config",
    "load_policy",
    "parse_policy",
    "replay",
]


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(module), name)
    globals()[name] = value  # the next use finds it at once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
