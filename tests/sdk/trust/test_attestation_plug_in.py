"""A verifier named in the configuration: found, asked, and never skipped."""

from __future__ import annotations

import hmac
import sys
from pathlib import Path

import numpy as np
import pytest

from cloud_runtime import auth
from nearfar.errors import ConfigError, NearfarError, PolicyDenied, SecurityError
from nearfar.secure.attestation import AttestedFacts
from nearfar.units import Deadline
from sdk.cloud.egress import Permit
from sdk.cloud.link import CloudLink
from sdk.config import CloudConfig
from sdk.config_file import parse_config
from sdk.policy import Requirement, Verdict
from sdk.trust.attestation import CheckedVerifier, load_verifier
from tests.cloud_runtime.support import ScriptedModel, make_state, run, running, served

MACHINE_KEY = b"the mock's hardware key"
PLUG_IN = '''
"""Of a test: a machine whose key both know."""
import hmac
from nearfar.errors import SecurityError
from nearfar.secure.attestation import AttestedFacts

class Verifier:
    def verify(self, evidence, binding):
        tag, claims = evidence[:32], evidence[32:]
        good = hmac.digest(b"the mock\'s hardware key", claims + binding, "sha256")
        if not hmac.compare_digest(tag, good):
            raise SecurityError("The evidence is not of this machine")
        return AttestedFacts(claims=claims)

class Broken(Verifier):
    def verify(self, evidence, binding):
        return evidence[5000]

class Agreeable:
    def verify(self, evidence, binding):
        return True

class Vague:
    def verify(self, evidence, binding):
        return AttestedFacts(claims="measurement")

class Later:
    async def verify(self, evidence, binding):
        raise SecurityError("never reached")

class Needy:
    def __init__(self, path):
        pass

class Nested:
    make = Verifier

def nothing():
    return None

def fails():
    raise RuntimeError("no device")

number = 7
'''


class Attester:
    claims = b"measurement 7"

    def __init__(self, key: bytes = MACHINE_KEY) -> None:
        self.key = key

    def evidence(self, binding: bytes) -> bytes:
        return hmac.digest(self.key, self.claims + binding, "sha256") + self.claims


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that can be imported during this test."""
    folder = tmp_path / "plug_ins"
    folder.mkdir()
    (folder / "test_plug_in.py").write_text(PLUG_IN)
    (folder / "test_plug_in_broken.py").write_text("1 / 0")
    (folder / "test_plug_in_needy.py").write_text("import no_such_library.part")
    monkeypatch.syspath_prepend(str(folder))
    for name in ("test_plug_in", "test_plug_in_broken", "test_plug_in_needy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "test_plug_in"


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("no_such_plug_in:Verifier", "no module 'no_such_plug_in'"),
        ("no_such.plug.in_:Verifier", "no module 'no_such'"),
        ("test_plug_in.sub:Verifier", "no module 'test_plug_in.sub'"),
        ("test_plug_in_needy:Verifier", "needs the module 'no_such_library'"),
        ("test_plug_in_broken:Verifier", "importing it failed with ZeroDivisionError"),
        ("test_plug_in:verifier", "has no 'verifier'"),
        ("test_plug_in:Nested.missing", "has no 'Nested.missing'"),
        ("test_plug_in:number", "no class or function"),
        ("test_plug_in:Needy", "calling it failed with TypeError"),
        ("test_plug_in:fails", "calling it failed with RuntimeError: no device"),
        ("test_plug_in:nothing", "has no method 'verify'"),
        ("test_plug_in:Later", "coroutine function"),
    ],
)
def test_a_plug_in_that_cannot_be_used_says_why(plug_in: str, reference: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_verifier(reference, cloud="main")
    assert words in caught.value.problem
    assert "cloud 'main': 'attestation' names" in caught.value.problem
    assert caught.value.field == "attestation"
    assert caught.value.fix


@pytest.mark.parametrize("name", ["Verifier", "Nested.make"])
def test_a_plug_in_is_found_by_name(plug_in: str, name: str) -> None:
    verifier = load_verifier(f"{plug_in}:{name}", cloud="main")
    assert verifier.verify(Attester().evidence(b"b"), b"b") == AttestedFacts(claims=Attester.claims)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Verifier", "not of this machine"),
        ("Broken", "failed with IndexError"),
        ("Agreeable", "gave bool and not AttestedFacts"),
        ("Vague", "not AttestedFacts"),
    ],
)
def test_what_is_not_clearly_accepted_is_refused(plug_in: str, name: str, words: str) -> None:
    verifier = load_verifier(f"{plug_in}:{name}", cloud="main")
    with pytest.raises(SecurityError, match=words):
        verifier.verify(b"evidence", b"binding")


def test_the_configuration_names_it_and_imports_nothing(plug_in: str) -> None:
    text = f'''
        [cloud.main]
        url = "wss://inference.example.com/v1/nearfar"
        identity = "nf1:9k2fexample"
        attestation = "{plug_in}:Verifier"
    '''
    cloud = parse_config(text).cloud
    assert cloud is not None
    assert cloud.attestation == f"{plug_in}:Verifier"
    assert plug_in not in sys.modules


def test_a_plug_in_by_name_and_one_in_code_are_refused_together() -> None:
    fields = {"url": "wss://h/v1/nearfar", "identity": "nf1:9k2fexample", "attestation": "a:b"}
    with pytest.raises(ConfigError, match="stands beside 'verifier'"):
        CloudConfig(**fields, verifier=CheckedVerifier(None, ""))  # type: ignore[arg-type]


def connect(
    tmp_path: Path, attester: Attester | None, *, ask: Verdict | None = None, **changes: object
) -> set[str]:
    """Names of the models of a real server; or, with a verdict, of the outputs of one of them."""
    state = make_state(tmp_path / "state")
    credentials = tmp_path / "key.txt"
    credentials.write_text(auth.add_key(state, "clinic-2"))
    credentials.chmod(0o600)

    async def main() -> set[str]:
        async with running(served(ScriptedModel()), state, attester=attester) as server:
            link = CloudLink(
                CloudConfig(
                    url=server.url,
                    identity=server.pin,
                    ca_file=state.ca_certificate,
                    credentials=f"file:{credentials}",
                    **changes,  # type: ignore[arg-type]
                )
            )
            try:
                deadline = Deadline.after_ms(20_000)
                if ask is None:
                    return set((await link.connect(deadline)).offers or ())
                reply = await link.infer(
                    Permit(ask, "scripted"),
                    model="scripted",
                    form="tensors",
                    tensors={"x": np.ones((1, 4), np.float32)},
                    deadline=deadline,
                )
                return set(reply.outputs)
            finally:
                await link.close()

    return run(main())


def test_a_cloud_whose_evidence_holds_is_used(tmp_path: Path, plug_in: str) -> None:
    attestation = f"{plug_in}:Verifier"
    assert connect(tmp_path, Attester(), attestation=attestation) == {"scripted"}


@pytest.mark.parametrize(
    ("key", "name", "words"),
    [
        (None, "Verifier", "attests nothing"),
        (b"another machine", "Verifier", "not of this machine"),
        (MACHINE_KEY, "Broken", "counts as refused"),
        (MACHINE_KEY, "Agreeable", "counts as refused"),
        (MACHINE_KEY, "missing", "has no 'missing'"),
    ],
)
def test_everything_else_ends_before_the_client_says_who_it_is(
    tmp_path: Path, plug_in: str, caplog: pytest.LogCaptureFixture, key, name, words
) -> None:
    caplog.set_level("INFO")
    attester = None if key is None else Attester(key)
    with pytest.raises(NearfarError, match=words) as caught:
        connect(tmp_path, attester, attestation=f"{plug_in}:{name}")
    assert isinstance(caught.value, (SecurityError, ConfigError))
    assert not caught.value.retryable
    assert "open key=" not in caplog.text


ATTESTED = Verdict(
    edge=False,
    cloud=True,
    rule_ids=("proven",),
    reason="ok",
    policy_hash="h",
    require=Requirement(attestation=True),
)


def test_a_request_that_demands_attestation_goes_to_an_attested_connection(
    tmp_path: Path, plug_in: str
) -> None:
    attestation = f"{plug_in}:Verifier"
    assert connect(tmp_path, Attester(), ask=ATTESTED, attestation=attestation) == {"y"}


def test_a_request_that_demands_attestation_never_goes_to_another(tmp_path: Path) -> None:
    """Even if everybody before the door was wrong about the connection."""
    with pytest.raises(PolicyDenied, match="this connection is not attested") as caught:
        connect(tmp_path, Attester(), ask=ATTESTED)
    assert caught.value.rule == "proven"


def test_a_verifier_in_code_is_held_to_the_same(tmp_path: Path, plug_in: str) -> None:
    class Agreeable:
        def verify(self, evidence: bytes, binding: bytes) -> bool:
            return True

    with pytest.raises(SecurityError, match="plug-in verifier gave bool"):
        connect(tmp_path, Attester(), verifier=Agreeable())
