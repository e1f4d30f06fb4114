"""The seam that translates the errors of websockets, TLS and the system."""

from __future__ import annotations

import asyncio
import inspect
import socket
import ssl

import pytest
import websockets.exceptions
from websockets.datastructures import Headers
from websockets.frames import Close
from websockets.http11 import Response

from nearfar.errors import CloudUnavailable, ConfigError, NearfarError, SecurityError
from sdk.cloud.failures import translate

URL = "wss://cloud.example/v1/nearfar"

_SAMPLES = {
    "ConnectionClosed": (Close(1006, ""), None, None),
    "ConnectionClosedOK": (Close(1000, ""), None, None),
    "ConnectionClosedError": (Close(1011, "broken"), None, None),
    "InvalidURI": ("wss:", "no host"),
    "InvalidProxy": ("x", "unknown scheme"),
    "InvalidProxyStatus": (Response(407, "no", Headers()),),
    "InvalidStatus": (Response(503, "busy", Headers()),),
    "InvalidHeader": ("Upgrade", "x"),
    "InvalidHeaderFormat": ("Upgrade", "x", "y", 0),
    "InvalidHeaderValue": ("Upgrade", "x"),
    "InvalidMethod": ("POST",),
    "InvalidOrigin": ("x",),
    "InvalidUpgrade": ("Upgrade", "x"),
    "InvalidProtocol": ("HTTP/2",),
    "DuplicateParameter": ("x",),
    "InvalidParameterName": ("x",),
    "InvalidParameterValue": ("x", "y"),
    "PayloadTooBig": (10, 5),
}


def websockets_errors():
    for name in websockets.exceptions.__all__:
        kind = getattr(websockets.exceptions, name)
        if inspect.isclass(kind) and issubclass(kind, BaseException):
            yield name, kind


@pytest.mark.parametrize(("name", "kind"), list(websockets_errors()))
def test_every_error_of_websockets_becomes_one_of_ours_with_the_address(name, kind):
    ours = translate(kind(*_SAMPLES.get(name, ("x",))), URL)
    assert type(ours) is not NearfarError
    assert isinstance(ours, (CloudUnavailable, SecurityError, ConfigError))
    assert URL in ours.problem


@pytest.mark.parametrize(
    "error",
    [
        OSError(101, "Network is unreachable"),
        ConnectionRefusedError(111, "refused"),
        ConnectionResetError(104, "reset"),
        BrokenPipeError(32, "pipe"),
        TimeoutError(),
        asyncio.TimeoutError(),
        socket.gaierror(-2, "Name or service not known"),
        EOFError("stream ends after 0 bytes"),
    ],
)
def test_network_trouble_is_an_unavailable_cloud(error):
    ours = translate(error, URL, during="connect")
    assert type(ours) is CloudUnavailable
    assert ours.retryable
    assert ours.fix


def certificate_error(code: int, message: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code = code
    error.verify_message = message
    return error


@pytest.mark.parametrize(
    ("code", "word"),
    [(10, "expired"), (9, "not valid yet"), (62, "another host"), (19, "CA"), (20, "CA"), (7, "")],
)
def test_a_bad_certificate_is_a_security_error_that_says_what_to_do(code, word):
    ours = translate(certificate_error(code, "because"), URL, during="connect")
    assert type(ours) is SecurityError
    assert word in ours.problem
    assert ours.fix
    assert not ours.retryable


def test_an_error_that_is_ours_already_stays_as_it_is():
    ours = SecurityError("no")
    assert translate(ours, URL) is ours
