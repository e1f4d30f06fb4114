"""Tokens: short-lived JWTs (RFC 7519) that name the one key with which they may be used.

A token is signed by an issuer's Ed25519 key (EdDSA, RFC 8037), made out to this server's pin, and
lives for ten minutes at most. It names the client's public key (``cnf``, RFC 7800), and counts only
beside a proof by that key over the very channel it arrives on. It may limit what its holder does
(``models``, ``max_priority``), see `cloud_runtime.caller.permit`. Format:
docs/reference/secure-channel.md, "Client authentication".

PyJWT does all of JWT; it is imported when the first token is issued or checked.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from cloud_runtime.caller import Caller, NotAdmitted, stamp_of
from cloud_runtime.state import PRIVATE_MODE, StateDir
from nearfar.errors import ConfigError
from nearfar.files import write_atomically
from nearfar.secure.credentials import ClientPublicKey, proof_message

logger = logging.getLogger(__name__)

ALGORITHM = "EdDSA"
MAX_LIFETIME_S = 600
#: How far the clocks of issuer and server may be apart.
CLOCK_TOLERANCE_S = 60
#: A token with all its claims has some 600 bytes; who sends more sends something else.
MAX_TOKEN_BYTES = 4096
DEFAULT_ISSUER = "nearfar-cloud"

_MAX_ISSUERS = 16
_MAX_FILE_BYTES = 1 << 20
#: More than a server has; what is longer than a name is a mistake.
MAX_MODELS = 64
MAX_MODEL_CHARACTERS = 256
#: `nearfar.wire.messages.Infer.priority`.
HIGHEST_PRIORITY = 9
_REQUIRED = ("iss", "aud", "sub", "iat", "exp", "cnf")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class _Jwk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A public Ed25519 key as RFC 8037 writes it; `d` is read only to refuse a private one."""

    kty: str
    crv: str
    x: str
    d: str | None = None


class _Confirmation(msgspec.Struct, frozen=True, kw_only=True):
    """The claim ``cnf`` (RFC 7800, section 3.2)."""

    jwk: _Jwk


class Issuer(msgspec.Struct, frozen=True, kw_only=True):
    """Who may issue tokens.

    Attributes:
        issuer: The token's ``iss``; may stand in several entries while a key is being replaced.
        jwk: The public key that signs.
    """

    issuer: str
    jwk: _Jwk


class _IssuerFile(msgspec.Struct, frozen=True, kw_only=True):
    version: int = 1
    issuers: tuple[Issuer, ...] = ()


# Issuing.


def init_issuer(state: StateDir, *, issuer: str = DEFAULT_ISSUER) -> None:
    """Make a signing key, and let the server accept what it signs.

    Writes ``token-signing.key`` (PEM, mode 0600) and adds an entry to ``token-issuers.json``.

    Raises:
        ConfigError: There is a signing key already, or no such state directory.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with state.locked():
        if state.token_key.exists():
            raise ConfigError(
                f"{state.token_key} exists already",
                field="state",
                fix=f"Move it away, and take its entry out of {state.token_issuers}, to replace it",
            )
        issuers = read_issuers(state.token_issuers)
        entry = Issuer(issuer=issuer, jwk=_jwk_of(key.public_key()))
        data = msgspec.json.encode(_IssuerFile(issuers=(*issuers, entry)))
        write_atomically(state.token_key, pem, mode=PRIVATE_MODE)
        write_atomically(
            state.token_issuers, msgspec.json.format(data, indent=2) + b"\n", mode=PRIVATE_MODE
        )


def issue(
    state: StateDir,
    *,
    tenant: str,
    client_key: ClientPublicKey,
    audience: str,
    lifetime_s: int = MAX_LIFETIME_S,
    models: Sequence[str] | None = None,
    max_priority: int | None = None,
    now_s: float | None = None,
) -> str:
    """A token for one client, signed with the state directory's key.

    Args:
        tenant: Who the client is; ``sub``.
        client_key: The key that the client proves to have.
        audience: The server's pin.
        lifetime_s: Up to 600.
        models: Names of the models that it allows, or patterns (``chat-*``); `None` allows all.
        max_priority: Highest priority that it allows, 0 to 9; `None` allows all.
        now_s: Wall clock; now when `None`.

    Raises:
        ConfigError: There is no signing key, or tenant, lifetime or limits do not fit.
    """
    if not _TENANT.fullmatch(tenant):
        raise ConfigError(
            f"{tenant!r} cannot name a tenant",
            field="tenant",
            fix="Use up to 64 letters, digits, dots, dashes, underscores and @, e.g. clinic-2",
        )
    if not 0 < lifetime_s <= MAX_LIFETIME_S:
        raise ConfigError(
            f"A token cannot live for {lifetime_s} s",
            field="minutes",
            fix=f"Choose up to {MAX_LIFETIME_S // 60} minutes",
        )
    limits: dict[str, Any] = {}
    if models is not None:
        limits["models"] = list(models)
    if max_priority is not None:
        limits["max_priority"] = max_priority
    try:
        _limits_of(limits)
    except NotAdmitted as exc:
        raise ConfigError(
            f"The limits do not fit into a token: {exc}",
            field="models" if "models" in str(exc) else "max_priority",
            fix=f"Name up to {MAX_MODELS} models, and a priority of 0 to {HIGHEST_PRIORITY}",
        ) from None
    try:
        key = load_pem_private_key(state.token_key.read_bytes(), password=None)
    except FileNotFoundError as exc:
        raise ConfigError(
            f"There is no signing key {state.token_key}",
            field="state",
            fix=f"Make one with: nearfar cloud token init --state {state.path}",
        ) from exc
    except (OSError, ValueError, TypeError) as exc:
        # The cause may quote the key, so only its type goes on.
        raise ConfigError(
            f"The signing key {state.token_key} cannot be read ({type(exc).__name__})",
            field="state",
            fix="Restore it from a backup, or make a new one with `nearfar cloud token init`",
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            f"The signing key {state.token_key} is not an Ed25519 key",
            field="state",
            fix="Make one with `nearfar cloud token init`",
        )
    jwk = _jwk_of(key.public_key())
    names = [entry.issuer for entry in read_issuers(state.token_issuers) if entry.jwk == jwk]
    if not names:
        raise ConfigError(
            f"{state.token_issuers} has no entry for {state.token_key.name}",
            field="state",
            fix="Restore both files from a backup, or move both away and run "
            "`nearfar cloud token init` again",
        )
    issued_s = int(time.time() if now_s is None else now_s)
    confirmation = _jwk_of(Ed25519PublicKey.from_public_bytes(client_key.public_key))
    claims = {
        "iss": names[0],
        "sub": tenant,
        "aud": audience,
        "iat": issued_s,
        "nbf": issued_s,
        "exp": issued_s + lifetime_s,
        "cnf": {"jwk": msgspec.to_builtins(confirmation)},
        **limits,
    }
    token = str(_jwt().encode(claims, key, algorithm=ALGORITHM))
    if len(token) > MAX_TOKEN_BYTES:
        raise ConfigError(
            f"The token would have {len(token)} bytes, and {MAX_TOKEN_BYTES} are accepted",
            field="models",
            fix="Use a pattern, such as chat-*, for models that are allowed together",
        )
    return token


# Checking.


def read_issuers(path: Path) -> tuple[Issuer, ...]:
    """Who may issue tokens; nobody when there is no such file.

    Raises:
        ConfigError: The file is too large or malformed.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than 1 MiB", field=str(path), fix="Repair it")
        file = msgspec.json.decode(path.read_bytes(), type=_IssuerFile)
        for entry in file.issuers:
            _public_key_of(entry.jwk)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as exc:  # msgspec's errors are ValueErrors
        raise ConfigError(
            f"The issuer file {path} cannot be read: {exc}",
            field=str(path),
            fix="Repair it, or restore it from a backup",
        ) from exc
    if file.version != 1 or len(file.issuers) > _MAX_ISSUERS:
        raise ConfigError(
            f"The issuer file {path} has version {file.version} and {len(file.issuers)} issuers",
            field=str(path),
            fix=f"This version of nearfar reads version 1 with up to {_MAX_ISSUERS} issuers",
        )
    return file.issuers


class TokenVerifier:
    """Checks tokens and their proofs, and follows the issuer file while the server runs.

    A file that cannot be read means that no token is accepted: errors deny.

    Args:
        path: The issuer file; it may be missing, and may come later.
        audience: This server's pin.

    Attributes:
        revision: Counts how often the issuers changed.

    Raises:
        ConfigError: The file is malformed.
    """

    def __init__(self, path: Path, *, audience: str) -> None:
        self._path = path
        self._audience = audience
        self._stamp = stamp_of(path)
        self._issuers = read_issuers(path)
        self.revision = 0

    def verify(self, token: str, *, proof: bytes, exporter: bytes) -> Caller:
        """Who the token and the proof let in.

        Args:
            token: As the client sent it.
            proof: Signature by the key that the token names.
            exporter: The channel's exporter secret, with which the proof must have been made.

        Raises:
            NotAdmitted: They let nobody in.
        """
        self.reload_if_changed()
        if len(token) > MAX_TOKEN_BYTES:
            raise NotAdmitted("the token is too long")
        issuer, claims = self._claims_of(token)
        lifetime_s = int(claims["exp"]) - int(claims["iat"])
        if not 0 < lifetime_s <= MAX_LIFETIME_S:
            # Not how long: a JSON number may have thousands of digits.
            raise NotAdmitted(f"the token does not live for 1 to {MAX_LIFETIME_S} s")
        tenant = claims["sub"]
        if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
            raise NotAdmitted("the token's sub cannot name a tenant")
        models, max_priority = _limits_of(claims)
        client_key = _confirmation_key(claims["cnf"])
        if not client_key.verifies(proof, proof_message(exporter, token)):
            raise NotAdmitted("the proof is not by the token's key over this channel")
        # Two clients of one tenant do not see each other's answers by each other's request ids.
        scope = hashlib.sha256(
            b"token\x00" + issuer.issuer.encode() + b"\x00" + tenant.encode()
            + b"\x00" + client_key.public_key
        ).hexdigest()  # fmt: skip
        return Caller(
            name=f"token:{tenant}",
            scope=scope,
            issuer=issuer,
            expires_s=float(claims["exp"]) + CLOCK_TOLERANCE_S,
            models=models,
            max_priority=max_priority,
        )

    def is_accepted(self, issuer: Issuer) -> bool:
        """Whether an issuer that was trusted once still is."""
        return issuer in self._issuers

    def reload_if_changed(self) -> None:
        """Read the file again if it changed."""
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        self.revision += 1
        try:
            self._issuers = read_issuers(self._path)
        except ConfigError as error:
            self._issuers = ()
            logger.error("no token is accepted until this is repaired: %s", error)
        else:
            logger.info("token issuers read again: %d accepted", len(self._issuers))

    def _claims_of(self, token: str) -> tuple[Issuer, dict[str, Any]]:
        """The claims, once signature, times, issuer and audience hold."""
        jwt = _jwt()
        for issuer in self._issuers:
            try:
                claims: dict[str, Any] = jwt.decode(
                    token,
                    _public_key_of(issuer.jwk),
                    algorithms=[ALGORITHM],
                    audience=self._audience,
                    issuer=issuer.issuer,
                    leeway=CLOCK_TOLERANCE_S,
                    options={"require": list(_REQUIRED)},
                )
            except jwt.InvalidSignatureError:
                continue
            except jwt.PyJWTError as exc:
                # Its text may quote claims; its type says enough.
                raise NotAdmitted(f"the token fails: {type(exc).__name__}") from None
            except (ValueError, TypeError, OverflowError, RecursionError) as exc:
                raise NotAdmitted(f"the token is malformed: {type(exc).__name__}") from None
            return issuer, claims
        raise NotAdmitted("the token is signed by no issuer that is known here")


def _limits_of(claims: dict[str, Any]) -> tuple[tuple[str, ...] | None, int | None]:
    """The claims ``models`` and ``max_priority``: `None` for one that is absent.

    One that is there and cannot be understood admits nobody: it was meant to limit something.
    """
    models: tuple[str, ...] | None = None
    if "models" in claims:
        names = claims["models"]
        if not (
            isinstance(names, list)
            and len(names) <= MAX_MODELS
            and all(isinstance(name, str) and 0 < len(name) <= MAX_MODEL_CHARACTERS
                    for name in names)
        ):  # fmt: skip
            raise NotAdmitted(f"the token's models is not a list of up to {MAX_MODELS} names")
        models = tuple(names)
    max_priority = claims.get("max_priority")
    if "max_priority" in claims and not (
        isinstance(max_priority, int)
        and not isinstance(max_priority, bool)
        and 0 <= max_priority <= HIGHEST_PRIORITY
    ):
        raise NotAdmitted(f"the token's max_priority is not a number of 0 to {HIGHEST_PRIORITY}")
    return models, max_priority


def _confirmation_key(confirmation: object) -> ClientPublicKey:
    """The key that ``cnf`` names."""
    try:
        jwk = msgspec.convert(confirmation, _Confirmation).jwk
        return ClientPublicKey(_public_key_of(jwk).public_bytes_raw())
    except ValueError:  # msgspec's errors are ValueErrors
        raise NotAdmitted("the token's cnf does not hold a public Ed25519 key") from None


def _jwk_of(key: Ed25519PublicKey) -> _Jwk:
    fields: dict[str, Any] = _jwt().algorithms.OKPAlgorithm.to_jwk(key, as_dict=True)
    return _Jwk(kty=fields["kty"], crv=fields["crv"], x=fields["x"])


def _public_key_of(jwk: _Jwk) -> Ed25519PublicKey:
    """The key.

    Raises:
        ValueError: It is not a public Ed25519 key.
    """
    jwt = _jwt()
    try:
        key = jwt.algorithms.OKPAlgorithm.from_jwk(msgspec.to_builtins(jwk))
    except jwt.PyJWTError as exc:
        raise ValueError("not an Ed25519 key") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("not an Ed25519 key")
    return key


def _jwt() -> Any:
    try:
        import jwt
    except ImportError as exc:
        raise ConfigError(
            "Tokens need the package PyJWT, which is not installed",
            field="token",
            fix="pip install 'nearfar[cloud]'",
        ) from exc
    return jwt
