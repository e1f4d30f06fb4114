"""The seam: every error of websockets, TLS and the operating system becomes one of ours, here.

certificate expired, of another host, or from an unknown CA    SecurityError (with the fix)
TLS refused for another reason                                 SecurityError
refused, unreachable, unknown host, timed out, closed          CloudUnavailable
answered with HTTP 401 or 403                                  SecurityError
a message larger than agreed, broken framing                   RemoteProtocolError
"""

from __future__ import annotations

import asyncio
import socket
import ssl

from nearfar.errors import (
    CloudUnavailable,
    ConfigError,
    NearfarError,
    RemoteProtocolError,
    SecurityError,
)

# OpenSSL, x509_vfy.h: X509_V_ERR_*
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_ISSUER = (2, 18, 19, 20, 21)
_OTHER_HOST = (62, 64)

#: RFC 6455 section 7.4.1: close codes by which a peer says that somebody broke the protocol.
_BROKEN_PROTOCOL = (1002, 1003, 1007, 1009)


def translate(exc: BaseException, url: str, *, during: str = "use") -> NearfarError:
    """Our error for a failure of the connection to `url`.

    Args:
        exc: What websockets, ssl, asyncio or the operating system raised.
        url: The cloud's address, for the text.
        during: ``connect`` before the websocket was open, else ``use``.

    Returns:
        An error to raise ``from exc``. An error that is already ours comes back as it is.
    """
    from websockets import exceptions as ws

    if isinstance(exc, NearfarError):
        return exc
    if isinstance(exc, ssl.SSLCertVerificationError):
        return _certificate_error(exc, url)
    if isinstance(exc, ssl.SSLError):
        if during != "connect":
            return CloudUnavailable(f"The connection to {url} was lost: {exc.reason or exc}")
        return SecurityError(
            f"TLS with {url} failed: {exc.reason or exc}",
            fix="The cloud must speak TLS 1.3; check that the port is the right one",
        )
    if isinstance(exc, (ws.InvalidURI, ws.InvalidProxy)):
        return ConfigError(
            f"{url} cannot be connected to: {exc}",
            field="url",
            fix="Write it as wss://HOST:PORT/v1/nearfar",
        )
    if isinstance(exc, ws.InvalidStatus):
        status = exc.response.status_code
        if status in (401, 403):
            return SecurityError(
                f"{url} refused the connection with HTTP status {status}",
                fix="Ask the operator whether a proxy in front of the cloud demands credentials",
            )
        return CloudUnavailable(
            f"{url} answered with HTTP status {status} instead of opening a websocket",
            fix="Check the path: a nearfar cloud listens on /v1/nearfar",
        )
    if isinstance(exc, ws.ConnectionClosed):
        return _closed_error(exc, url)
    if isinstance(exc, ws.InvalidHandshake):
        return CloudUnavailable(
            f"{url} did not open a websocket: {exc}",
            fix="Check that the address is that of a nearfar cloud, not of another web server",
        )
    if isinstance(exc, ws.WebSocketException):  # too big, too fragmented, malformed
        return RemoteProtocolError(f"{url} broke the websocket protocol: {exc}")
    if isinstance(exc, (TimeoutError, asyncio.TimeoutError)):
        return CloudUnavailable(
            f"{url} did not answer in time",
            fix="Check the network and that the cloud runs: nearfar doctor",
        )
    if isinstance(exc, socket.gaierror):
        return CloudUnavailable(
            f"The host of {url} is not known: {exc.strerror}",
            fix="Check the spelling of `url` and the network",
        )
    if isinstance(exc, ConnectionRefusedError):
        return CloudUnavailable(
            f"Nothing listens at {url}",
            fix="Start the cloud with `nearfar cloud serve`, or correct `url`",
        )
    if isinstance(exc, (OSError, EOFError)):
        verb = "could not be reached" if during == "connect" else "was lost"
        text = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
        return CloudUnavailable(f"{url} {verb}: {text}", fix="Check the network: nearfar doctor")
    if isinstance(exc, asyncio.CancelledError):
        return CloudUnavailable(f"The connection to {url} was closed by this client")
    return CloudUnavailable(f"The connection to {url} failed: {type(exc).__name__}: {exc}")


def _certificate_error(exc: ssl.SSLCertVerificationError, url: str) -> SecurityError:
    code = exc.verify_code
    if code == _EXPIRED:
        return SecurityError(
            f"The TLS certificate of {url} has expired",
            fix="Renew it on the server; also check this device's clock",
        )
    if code == _NOT_YET_VALID:
        return SecurityError(
            f"The TLS certificate of {url} is not valid yet",
            fix="Check this device's clock",
        )
    if code in _OTHER_HOST:
        return SecurityError(
            f"The TLS certificate of {url} is for another host: {exc.verify_message}",
            fix="Use the host name that the certificate was made for, or make one for this host "
            "(nearfar cloud init DIR --host NAME)",
        )
    if code in _UNKNOWN_ISSUER:
        return SecurityError(
            f"The TLS certificate of {url} comes from a CA that is not trusted here",
            fix="Set `ca_file` of this cloud to the CA's certificate (ca.pem)",
        )
    return SecurityError(
        f"The TLS certificate of {url} was not accepted: {exc.verify_message}",
        fix="Replace the certificate on the server",
    )


def _closed_error(exc: BaseException, url: str) -> NearfarError:
    frame = getattr(exc, "rcvd", None) or getattr(exc, "sent", None)
    if frame is not None and frame.code in _BROKEN_PROTOCOL:
        return RemoteProtocolError(
            f"The connection to {url} was closed: {frame.code} {frame.reason}".rstrip()
        )
    how = f" ({frame.code} {frame.reason})".replace(" )", ")") if frame is not None else ""
    return CloudUnavailable(f"The connection to {url} was closed{how}", fix="Try again")
