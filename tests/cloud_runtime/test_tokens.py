"""Tokens: issued, checked, bound to a key and a channel; every way to be refused reads alike."""

from __future__ import annotations

import base64
import json
import stat
import time

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud_runtime import auth, tokens
from cloud_runtime.auth import Authenticator
from cloud_runtime.caller import NotAdmitted, refusal
from cloud_runtime.state import StateDir
from cloud_runtime.tokens import TokenVerifier
from nearfar.errors import ConfigError, SecurityError
from nearfar.secure.credentials import ClientKey, TokenCredentials

AUDIENCE = "nf1:server"
EXPORTER = b"\x07" * 32
CLIENT = ClientKey(bytes(range(32)))


@pytest.fixture
def state(tmp_path) -> StateDir:
    state = StateDir(tmp_path)
    auth.write_keys(state.api_keys, ())
    tokens.init_issuer(state)
    return state


def issue(state: StateDir, **changes: object) -> str:
    fields = {"tenant": "clinic-2", "client_key": CLIENT.public, "audience": AUDIENCE}
    return tokens.issue(state, **{**fields, **changes})


def forge(state: StateDir, *, key: object = None, algorithm: str = "EdDSA", **changes) -> str:
    """A token with other claims, signed by the real issuer unless a key is given."""
    now_s = int(time.time())
    claims = {
        "iss": tokens.DEFAULT_ISSUER, "sub": "clinic-2", "aud": AUDIENCE, "iat": now_s,
        "nbf": now_s, "exp": now_s + 600, "cnf": {"jwk": jwk_of(CLIENT)}, **changes,
    }  # fmt: skip
    claims = {name: value for name, value in claims.items() if value is not None}
    if key is None:
        key = load_pem_private_key(state.token_key.read_bytes(), password=None)
    return jwt.encode(claims, key, algorithm=algorithm)


def jwk_of(key: ClientKey) -> dict[str, str]:
    x = base64.urlsafe_b64encode(key.public.public_key).rstrip(b"=").decode()
    return {"kty": "OKP", "crv": "Ed25519", "x": x}


def admit(state: StateDir, token: str, *, key: ClientKey = CLIENT, exporter: bytes = EXPORTER,
          at: bytes = EXPORTER):  # fmt: skip
    verifier = TokenVerifier(state.token_issuers, audience=AUDIENCE)
    authenticator = Authenticator(state.api_keys, tokens=verifier)
    proof = TokenCredentials(token, key).prove(exporter)
    return authenticator.authenticate(token, proof=proof, exporter=at)


def refused(state: StateDir, token: str, **how: object) -> str:
    """The reason for the log; the client's text is checked to be the one text."""
    with pytest.raises(SecurityError) as caught:
        admit(state, token, **how)
    assert str(caught.value) == str(refusal())
    assert isinstance(caught.value.__cause__, NotAdmitted)
    reason = str(caught.value.__cause__)
    assert token.split(".")[1] not in reason
    return reason


def test_the_holder_of_a_token_and_its_key_is_let_in_by_the_tenants_name(state):
    caller = admit(state, issue(state))
    assert caller.name == "token:clinic-2"
    assert caller.expires_s == pytest.approx(time.time() + 660, abs=5)


def test_two_clients_of_a_tenant_do_not_share_request_ids(state):
    other = ClientKey(b"\x09" * 32)
    mine = admit(state, issue(state))
    theirs = admit(state, issue(state, client_key=other.public), key=other)
    assert mine.name == theirs.name
    assert mine.scope != theirs.scope


def test_a_token_is_a_jwt_that_any_library_reads(state):
    token = issue(state, lifetime_s=120, now_s=1_800_000_000)
    header, claims, _ = token.split(".")
    decode = lambda part: json.loads(base64.urlsafe_b64decode(part + "=="))  # noqa: E731
    assert decode(header) == {"alg": "EdDSA", "typ": "JWT"}
    assert decode(claims) == {
        "iss": "nearfar-cloud", "sub": "clinic-2", "aud": AUDIENCE, "iat": 1_800_000_000,
        "nbf": 1_800_000_000, "exp": 1_800_000_120, "cnf": {"jwk": jwk_of(CLIENT)},
    }  # fmt: skip
    assert len(token) < 700


# Attacks.


def test_a_stolen_token_is_useless_without_its_key(state):
    assert "proof" in refused(state, issue(state), key=ClientKey.generate())


def test_a_stolen_token_without_any_proof_is_useless(state):
    verifier = TokenVerifier(state.token_issuers, audience=AUDIENCE)
    for proof in (b"", bytes(64), b"x"):
        with pytest.raises(SecurityError):
            Authenticator(state.api_keys, tokens=verifier).authenticate(
                issue(state), proof=proof, exporter=EXPORTER
            )


def test_a_proof_replayed_on_another_channel_is_refused(state):
    assert "proof" in refused(state, issue(state), at=b"\x08" * 32)


def test_a_proof_for_one_token_does_not_serve_another_token_of_the_same_key(state):
    first, second = issue(state), issue(state, lifetime_s=60)
    proof = TokenCredentials(first, CLIENT).prove(EXPORTER)
    verifier = TokenVerifier(state.token_issuers, audience=AUDIENCE)
    verifier.verify(first, proof=proof, exporter=EXPORTER)
    with pytest.raises(NotAdmitted):
        verifier.verify(second, proof=proof, exporter=EXPORTER)


def test_alg_none_and_other_algorithms_are_refused(state):
    none = forge(state, key="", algorithm="none")
    assert "fails" in refused(state, none)
    public = json.loads(state.token_issuers.read_text())["issuers"][0]["jwk"]["x"]
    # The classic confusion: the public key taken as an HMAC secret.
    assert "fails" in refused(state, forge(state, key=public, algorithm="HS256"))


#: Times are seconds from now, whenever the test runs.
WRONG_CLAIMS = {
    "wrong audience": ({"aud": "nf1:other"}, "InvalidAudienceError"),
    "no audience": ({"aud": None}, "MissingRequiredClaimError"),
    "wrong issuer": ({"iss": "someone"}, "InvalidIssuerError"),
    "expired": ({"iat": -700, "nbf": -700, "exp": -120}, "ExpiredSignature"),
    "not valid yet": ({"nbf": 300}, "ImmatureSignatureError"),
    "from the future": ({"iat": 300, "exp": 600}, "ImmatureSignatureError"),
    "too long-lived": ({"exp": 3600}, "does not live for"),
    "ends before it begins": ({"iat": 50, "exp": 20}, "does not live for"),
    "endless": ({"exp": None}, "MissingRequiredClaimError"),
    "of no age": ({"iat": None}, "MissingRequiredClaimError"),
    "no key": ({"cnf": None}, "MissingRequiredClaimError"),
    "only a thumbprint": ({"cnf": {"jkt": "x"}}, "cnf"),
    "key of another kind": ({"cnf": {"jwk": {"kty": "oct", "crv": "", "x": "x"}}}, "cnf"),
    "private key inside": ({"cnf": {"jwk": {**jwk_of(CLIENT), "d": "AAAA"}}}, "cnf"),
    "X25519 key": ({"cnf": {"jwk": {**jwk_of(CLIENT), "crv": "X25519"}}}, "cnf"),
    "short key": ({"cnf": {"jwk": {**jwk_of(CLIENT), "x": "AAAA"}}}, "cnf"),
    "key that is no text": ({"cnf": 7}, "cnf"),
    "models that are one": ({"models": "chat"}, "models"),
    "models that are nothing": ({"models": [""]}, "models"),
    "models that are numbers": ({"models": [7]}, "models"),
    "models that are too many": ({"models": ["m"] * 65}, "models"),
    "priority that is text": ({"max_priority": "3"}, "max_priority"),
    "priority that is yes": ({"max_priority": True}, "max_priority"),
    "priority that is too high": ({"max_priority": 10}, "max_priority"),
    "priority below all": ({"max_priority": -1}, "max_priority"),
    "priority in between": ({"max_priority": 2.5}, "max_priority"),
    "nobody": ({"sub": None}, "MissingRequiredClaimError"),
    "name that would break a log line": ({"sub": "a\nb"}, "cannot name a tenant"),
}


@pytest.mark.parametrize("name", WRONG_CLAIMS)
def test_claims_that_do_not_hold_are_refused_though_signed(state, name):
    changes, reason = WRONG_CLAIMS[name]
    now_s = int(time.time())
    moved = {
        claim: now_s + value if claim in ("iat", "nbf", "exp") and value is not None else value
        for claim, value in changes.items()
    }
    assert reason in refused(state, forge(state, **moved))


@pytest.mark.parametrize("exp", [10**2000, 1e308, 10.5e11])
def test_what_the_log_says_of_a_token_does_not_grow_with_its_numbers(state, exp):
    assert refused(state, forge(state, exp=exp)) == "the token does not live for 1 to 600 s"


def test_limits_that_are_null_let_nobody_in(state):
    """Whoever wrote them meant something by them."""
    now_s = int(time.time())
    key = load_pem_private_key(state.token_key.read_bytes(), password=None)
    claims = {
        "iss": tokens.DEFAULT_ISSUER, "sub": "clinic-2", "aud": AUDIENCE, "iat": now_s,
        "exp": now_s + 600, "cnf": {"jwk": jwk_of(CLIENT)},
    }  # fmt: skip
    admit(state, jwt.encode(claims, key, algorithm="EdDSA"))
    for name in ("models", "max_priority"):
        token = jwt.encode({**claims, name: None}, key, algorithm="EdDSA")
        assert name in refused(state, token)


def test_limits_reach_the_caller(state):
    caller = admit(state, issue(state, models=["chat-*", "minilm"], max_priority=3))
    assert (caller.models, caller.max_priority) == (("chat-*", "minilm"), 3)
    free = admit(state, issue(state))
    assert (free.models, free.max_priority) == (None, None)


def test_other_members_of_the_keys_jwk_do_not_matter(state):
    jwk = {**jwk_of(CLIENT), "kid": "1", "key_ops": ["verify"], "ext": True}
    assert admit(state, forge(state, cnf={"jwk": jwk, "kid": "1"})).name == "token:clinic-2"


def test_clocks_may_differ_by_a_minute(state):
    now_s = int(time.time())
    admit(state, forge(state, iat=now_s + 50, nbf=now_s + 50, exp=now_s + 200))
    admit(state, forge(state, iat=now_s - 600, nbf=now_s - 600, exp=now_s - 50))


def test_an_issuer_nobody_knows_is_refused(state):
    token = forge(state, key=Ed25519PrivateKey.generate())
    assert "no issuer that is known" in refused(state, token)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_no_character_of_a_token_can_be_changed(state, part):
    parts = issue(state).split(".")
    middle = len(parts[part]) // 2
    other = "A" if parts[part][middle] != "A" else "B"
    parts[part] = parts[part][:middle] + other + parts[part][middle + 1 :]
    refused(state, ".".join(parts))


def test_tokens_that_try_to_exhaust_the_parser_are_refused(state):
    nested = base64.urlsafe_b64encode(b"[" * 2500).decode()
    refused(state, f"{nested}.e30.AA")
    assert "too long" in refused(state, "a." + "b" * 5000 + ".c")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_any_text_is_refused_with_the_one_error(state, header, claims, signature):
    verifier = TokenVerifier(state.token_issuers, audience=AUDIENCE)
    for text in (
        f"{header}.{claims}.{signature}",
        ".".join(
            base64.urlsafe_b64encode(part.encode("utf-8", "surrogatepass")).decode()
            for part in (header, claims, signature)
        ),
    ):
        with pytest.raises(NotAdmitted):
            verifier.verify(text, proof=bytes(64), exporter=EXPORTER)


# The files.


def test_the_signing_key_is_private_and_never_replaced(state):
    assert stat.S_IMODE(state.token_key.stat().st_mode) == 0o600
    assert b"PRIVATE" not in state.token_issuers.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        tokens.init_issuer(state)


def test_a_running_server_follows_the_issuer_file(state):
    verifier = TokenVerifier(state.token_issuers, audience=AUDIENCE)
    authenticator = Authenticator(state.api_keys, tokens=verifier)
    token = issue(state)
    proof = TokenCredentials(token, CLIENT).prove(EXPORTER)
    caller = authenticator.authenticate(token, proof=proof, exporter=EXPORTER)
    assert authenticator.is_accepted(caller)
    revision = authenticator.revision
    state.token_issuers.unlink()
    authenticator.reload_if_changed()
    assert authenticator.revision != revision
    assert not authenticator.is_accepted(caller)
    with pytest.raises(SecurityError):
        authenticator.authenticate(token, proof=proof, exporter=EXPORTER)


@pytest.mark.parametrize(
    "damage",
    ["{", '{"version": 2}', '{"issuers": [{"issuer": "x", "jwk": {"kty": "OKP"}}]}',
     '{"issuers": [{"issuer": "x", "jwk": {"kty": "OKP", "crv": "Ed25519", "x": "AA"}}]}'],
)  # fmt: skip
def test_a_damaged_issuer_file_stops_the_start_and_admits_nobody_later(state, damage):
    verifier = TokenVerifier(state.token_issuers, audience=AUDIENCE)
    token = issue(state)
    state.token_issuers.write_text(damage)
    with pytest.raises(ConfigError, match=r"token-issuers\.json"):
        TokenVerifier(state.token_issuers, audience=AUDIENCE)
    with pytest.raises(NotAdmitted):
        verifier.verify(
            token, proof=TokenCredentials(token, CLIENT).prove(EXPORTER), exporter=EXPORTER
        )


def test_without_tokens_a_token_is_just_an_unknown_key(state):
    with pytest.raises(SecurityError) as caught:
        Authenticator(state.api_keys).authenticate(issue(state))
    assert str(caught.value.__cause__) == "unknown API key"


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"tenant": "a b"}, "cannot name a tenant"), ({"lifetime_s": 601}, "cannot live"),
     ({"lifetime_s": 0}, "cannot live"), ({"models": [""]}, "models is not a list"),
     ({"models": [str(n) * 100 for n in range(60)]}, "4096 are accepted"),
     ({"max_priority": 10}, "max_priority is not")],
)  # fmt: skip
def test_unfit_orders_are_refused(state, changes, match):
    with pytest.raises(ConfigError, match=match):
        issue(state, **changes)


def test_issuing_without_a_signing_key_says_how_to_make_one(state):
    state.token_key.unlink()
    with pytest.raises(ConfigError, match="nearfar cloud token init"):
        issue(state)
    state.token_key.write_text("-----BEGIN secret")
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        issue(state)
    assert "secret" not in str(caught.value)
