"""What a connection authenticates with and demands, fetched at the moment it is made."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING

from nearfar.errors import CloudUnavailable, ConfigError, NearfarError

if TYPE_CHECKING:
    from nearfar.secure.attestation import Verifier
    from nearfar.secure.credentials import Credentials
    from sdk.config import CloudConfig


async def credentials_of(config: CloudConfig) -> Credentials:
    """The API key, or the token and its key, that `config` names.

    A `token_provider` that is a plain function runs in a thread: it may ask a service.

    Raises:
        ConfigError: A file is missing or holds something else.
        SecurityError: Others can read the key file.
        CloudUnavailable: The `token_provider` failed.
    """
    from nearfar.secure.credentials import ApiKeyCredentials, ClientKey, TokenCredentials

    token = config.token() if config.token_provider is None else await _provided(config)
    if config.key_file is None:
        return ApiKeyCredentials(token)
    return TokenCredentials(token, ClientKey.load(config.key_file))


async def verifier_of(config: CloudConfig) -> Verifier | None:
    """What must accept the cloud's evidence, as `config` demands; `None` when it demands none.

    A plug-in that is named is imported when the first connection is made, in a thread; its class
    or function is called anew for each connection.

    Raises:
        ConfigError: The plug-in cannot be used; nothing is connected to.
    """
    if config.attestation is None and config.verifier is None:
        return None
    from sdk.trust.attestation import CheckedVerifier, load_verifier

    if config.attestation is not None:
        return await asyncio.to_thread(load_verifier, config.attestation, cloud=config.name)
    assert config.verifier is not None
    return CheckedVerifier(config.verifier, "verifier")


async def _provided(config: CloudConfig) -> str:
    provider = config.token_provider
    assert provider is not None
    try:
        if inspect.iscoroutinefunction(provider):
            token = await provider()
        else:
            token = await asyncio.to_thread(provider)
            if inspect.isawaitable(token):
                token = await token
    except (NearfarError, asyncio.CancelledError):
        raise
    except Exception as exc:
        # The app's code: whatever it meets, most likely a service that does not answer. Its text is
        # left to the cause, because it may quote the token.
        raise CloudUnavailable(
            f"The token_provider of cloud '{config.name}' failed with {type(exc).__name__}",
            fix="See the cause; the next request asks it again",
        ) from exc
    if not isinstance(token, str):
        raise ConfigError(
            f"The token_provider of cloud '{config.name}' gave {type(token).__name__}, not str",
            field="token_provider",
            fix="Return the token as text",
        )
    return config.checked_token(token)
