"""One trace from the app over the wire to the server, without content; nothing when it is off."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import numpy as np
import pytest

from cloud_runtime.settings import ServerSettings
from nearfar.errors import (
    CloudUnavailable,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    ModelNotFound,
    PolicyDenied,
)
from nearfar.units import Deadline
from nearfar.wire import messages as wire
from nearfar.wire.codec import decode, encode
from sdk import AsyncClient, CacheConfig, Client, CloudConfig, parse_policy
from sdk.config_file import parse_config
from tests.cloud_runtime.support import ScriptedModel, make_state, running, served
from tests.support.scripted_cloud import STORY, TENSOR, Abort, ScriptedCloud, tell
from tests.support.scripted_edge import ScriptedEdge, put_into
from tests.support.wire import LIMITS

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

POLICY = parse_policy(
    'version = 1\n[[rule]]\nid = "open"\nwhen = { sensitivity = "public" }\neffect = "cloud_ok"\n'
)
X = {"x": np.full((2, 4), 4711.25, np.float32)}

# A process has one of each, and never another; what is off by default sends nothing there.
EXPORTER = InMemorySpanExporter()
READER = InMemoryMetricReader()
PROVIDER = TracerProvider()
PROVIDER.add_span_processor(SimpleSpanProcessor(EXPORTER))
trace.set_tracer_provider(PROVIDER)
metrics.set_meter_provider(MeterProvider(metric_readers=[READER]))


@pytest.fixture(autouse=True)
def spans():
    EXPORTER.clear()
    yield EXPORTER
    EXPORTER.clear()


@pytest.fixture
def cloud(tmp_path):
    with ScriptedCloud(tmp_path / "state") as server:
        yield server


@pytest.fixture
def client(cloud, tmp_path):
    (tmp_path / "store").mkdir()
    with Client(
        cloud=cloud.config(),
        models=tmp_path / "store",
        policy=POLICY,
        sensitivity="public",
        telemetry=True,
    ) as made:
        made.device = put_into(made, ScriptedEdge((TENSOR, STORY)))
        yield made


def by_name() -> dict[str, object]:
    return {span.name: span for span in EXPORTER.get_finished_spans()}


def names() -> list[str]:
    return [span.name for span in EXPORTER.get_finished_spans()]


def is_child(child, parent) -> bool:
    return (
        child.parent is not None
        and child.parent.span_id == parent.context.span_id
        and child.context.trace_id == parent.context.trace_id
    )


# -- batches -------------------------------------------------------------------------------------


def test_a_request_on_the_device_is_a_span_with_its_step(client):
    client.infer("tensor", X, mode="edge_only")
    root, step = by_name()["nearfar infer"], by_name()["nearfar edge"]
    assert is_child(step, root)
    assert root.parent is None
    assert root.attributes["nearfar.model"] == "tensor"
    assert root.attributes["nearfar.route"] == "edge"
    assert root.attributes["nearfar.bytes_sent"] == 0
    assert step.attributes["nearfar.compute_ms"] > 0


def test_a_request_is_a_child_of_the_apps_span(client):
    with trace.get_tracer("app").start_as_current_span("app") as app:
        client.infer("tensor", X, mode="edge_only")
    assert is_child(by_name()["nearfar infer"], app)


def test_a_request_on_the_cloud_carries_the_ids_of_its_span(client, cloud):
    client.infer("tensor", X, mode="cloud_only")
    step = by_name()["nearfar cloud"]
    (sent,) = cloud.saw(wire.Infer)
    assert sent.trace == step.context.trace_id.to_bytes(16, "big") + step.context.span_id.to_bytes(
        8, "big"
    )
    assert is_child(by_name()["nearfar connect"], by_name()["nearfar infer"])
    assert by_name()["nearfar infer"].attributes["nearfar.bytes_sent"] > 0


def test_a_repair_shows_as_two_steps_of_one_request(client):
    client.device.fail_with = EngineError("4711 broke")
    client.infer("tensor", X, mode="prefer_edge")
    assert sorted(names()) == [
        "nearfar cloud", "nearfar connect", "nearfar edge", "nearfar infer",
    ]  # fmt: skip
    assert by_name()["nearfar edge"].attributes["nearfar.error"] == "engine"
    assert by_name()["nearfar infer"].attributes["nearfar.path"] == "edge → cloud"
    assert by_name()["nearfar infer"].status.is_ok


def test_a_failure_is_marked_with_its_code_and_nothing_else(client):
    with pytest.raises(PolicyDenied):
        client.infer("tensor", X, sensitivity="secret")
    root = by_name()["nearfar infer"]
    assert root.attributes["nearfar.error"] == "policy_denied"
    assert root.status.description == "policy_denied"
    assert root.events == ()


def test_no_plan_is_made_while_requests_are_traced(tmp_path):
    pytest.importorskip("onnxruntime")
    from tests.support.tiny import write_tiny_tensor_bundle

    write_tiny_tensor_bundle(tmp_path / "tiny")
    feeds = {"x": np.arange(4, dtype=np.float32).reshape(1, 4)}
    with Client(models=tmp_path, telemetry=True) as client:
        for _ in range(5):
            client.infer("tiny", feeds)
    assert names().count("nearfar infer") == 5


def test_a_kept_answer_takes_no_steps(client, tmp_path, cloud):
    with Client(
        cloud=cloud.config(), policy=POLICY, sensitivity="public", telemetry=True,
        cache={"tensor": CacheConfig()},
    ) as cached:  # fmt: skip
        cached.infer("tensor", X)
        cached.infer("tensor", X)
    assert names().count("nearfar infer") == 1


# -- streams -------------------------------------------------------------------------------------


def test_a_streamed_answer_is_one_span_until_its_end(client, cloud):
    stream = client.generate("story", "4711", max_new_tokens=3, mode="cloud_only")
    next(stream)
    assert "nearfar generate" not in names()
    stream.text()
    root, step = by_name()["nearfar generate"], by_name()["nearfar cloud"]
    assert is_child(step, root)
    assert cloud.saw(wire.Generate)[0].trace[:16] == root.context.trace_id.to_bytes(16, "big")
    assert [event.name for event in step.events] == ["first text"]
    assert root.attributes["nearfar.tokens"] == 3
    assert root.attributes["nearfar.finish_reason"] == "length"
    assert root.attributes["nearfar.ttft_ms"] > 0


def test_a_handover_is_two_routes_of_one_answer(client, cloud):
    def break_off(session, message, tensors):
        yield from tell(session, message, 5, cut_after=2)

    cloud.behaviour = break_off
    stream = client.generate("story", "Once", max_new_tokens=5, mode="prefer_cloud")
    stream.text()
    root = by_name()["nearfar generate"]
    assert root.attributes["nearfar.path"] == "cloud → edge"
    assert by_name()["nearfar cloud"].attributes["nearfar.error"] == "stream_interrupted"
    assert is_child(by_name()["nearfar edge"], root)
    assert root.status.is_ok


def test_a_stream_that_is_closed_or_fails_ends_its_spans(client, cloud):
    stream = client.generate("story", "Once", max_new_tokens=9, mode="cloud_only")
    next(stream)
    stream.close()
    stream.close()
    assert names().count("nearfar generate") == 1
    assert by_name()["nearfar generate"].attributes["nearfar.error"] == "cancelled"
    EXPORTER.clear()

    def cut(session, message, tensors):
        yield 0
        raise Abort

    cloud.behaviour = cut
    with pytest.raises(CloudUnavailable):
        client.generate("story", "Once", mode="cloud_only").text()
    assert by_name()["nearfar generate"].attributes["nearfar.error"]
    EXPORTER.clear()
    with pytest.raises(PolicyDenied):
        client.generate("story", "Once", sensitivity="secret")
    assert by_name()["nearfar generate"].attributes["nearfar.error"] == "policy_denied"
    EXPORTER.clear()
    cloud.behaviour = lambda *_: iter([30.0])
    client.warm_up("story")
    with pytest.raises(DeadlineExceeded):
        client.generate("story", "Once", mode="cloud_only", deadline_ms=200).text()
    assert by_name()["nearfar generate"].attributes["nearfar.error"] == "deadline_exceeded"
    assert names().count("nearfar generate") == 1


# -- to the server ---------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path):
    return make_state(tmp_path / "cloud")


def config(server) -> CloudConfig:
    return CloudConfig(
        url=server.url,
        identity=server.pin,
        credentials=f"file:{server.state.client_key}",
        ca_file=server.state.ca_certificate,
    )


def scenario(state, act, **options):
    async def run():
        models = served(ScriptedModel("tensor"), ScriptedModel("story", task="text-generation"))
        async with (
            running(models, state, ServerSettings(telemetry=True)) as server,
            AsyncClient(
                cloud=config(server), policy=POLICY, sensitivity="public", **options
            ) as client,
        ):
            return await act(client)

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_edge_wire_and_server_have_one_trace(state):
    async def act(client):
        with trace.get_tracer("app").start_as_current_span("app"):
            await client.infer("tensor", X)
            await (await client.generate("story", "4711", max_new_tokens=3)).text()

    scenario(state, act, telemetry=True)
    found = by_name()
    sent = [span for span in EXPORTER.get_finished_spans() if span.name == "nearfar cloud"]
    assert is_child(found["nearfar serve infer"], sent[0])
    assert is_child(found["nearfar serve generate"], sent[1])
    assert len({span.context.trace_id for span in EXPORTER.get_finished_spans()}) == 1
    served_infer = found["nearfar serve infer"]
    assert served_infer.attributes["nearfar.model"] == "tensor"
    assert served_infer.attributes["nearfar.compute_ms"] >= 0
    assert found["nearfar serve generate"].attributes["nearfar.tokens"] >= 3
    assert "nearfar.error" not in served_infer.attributes


def test_without_the_clients_consent_the_server_starts_its_own_trace(state):
    async def act(client):
        with trace.get_tracer("app").start_as_current_span("app"):
            await client.infer("tensor", X)

    scenario(state, act)
    found = by_name()
    assert found["nearfar serve infer"].parent is None
    assert found["nearfar serve infer"].context.trace_id != found["app"].context.trace_id


def test_a_request_that_the_server_refuses_is_marked_there(state):
    async def act(client):
        await client._link.connect(Deadline())
        connection = client._link._connection
        stream = connection.open_stream(
            wire.Infer,
            {"request_id": bytes(16), "model": "tensor", "version": "9", "tensors": ()},
            permit=permit("tensor"),
        )
        with pytest.raises(ModelNotFound):
            await stream.reply(Deadline())

    scenario(state, act, telemetry=True)
    assert by_name()["nearfar serve infer"].attributes["nearfar.error"] == "model_not_found"


def permit(model: str):
    from sdk.cloud.egress import Permit
    from sdk.policy.model import Verdict

    verdict = Verdict(edge=True, cloud=True, rule_ids=(), reason="", policy_hash="")
    return Permit(verdict, model)


# -- what holds ------------------------------------------------------------------------------------


def test_no_span_and_no_figure_holds_content(client, state):
    client.infer(
        "tensor", X, purpose="patient-4711-purpose", tenant="patient-4711-tenant", mode="cloud_only"
    )
    client.generate("story", "patient-4711 is my number", max_new_tokens=3, mode="edge_only").text()
    client.device.fail_with = EngineError("patient-4711 is in the text")
    with pytest.raises(EngineError):
        client.infer("tensor", X, mode="edge_only")
    exported = "".join(span.to_json() for span in EXPORTER.get_finished_spans())
    figures = READER.get_metrics_data().to_json()
    assert "tensor" in exported
    assert "nearfar.client.duration" in figures
    assert "nearfar.client.sent" in figures
    for word in ("patient-4711", "4711.25", "is my number", "e0 e1", "purpose", "tenant"):
        assert word not in exported
        assert word not in figures


def test_a_trace_that_is_not_sampled_does_not_go_over_the_wire(cloud, monkeypatch):
    quiet = TracerProvider(sampler=ALWAYS_OFF)
    monkeypatch.setattr("nearfar.telemetry.tracer", lambda name: quiet.get_tracer(name))
    monkeypatch.setattr("sdk.telemetry.tracer", lambda name: quiet.get_tracer(name))
    with Client(
        cloud=cloud.config(), policy=POLICY, sensitivity="public", telemetry=True
    ) as client:
        client.infer("tensor", X)
    assert cloud.saw(wire.Infer)[0].trace == b""


def test_when_it_is_off_nothing_is_sent_and_nothing_is_imported(cloud, tmp_path):
    with Client(cloud=cloud.config(), policy=POLICY, sensitivity="public") as client:
        client.infer("tensor", X)
        client.generate("story", "Once", max_new_tokens=2).text()
    assert cloud.saw(wire.Infer)[0].trace == cloud.saw(wire.Generate)[0].trace == b""
    assert names() == []
    code = (
        "import sys, sdk; sdk.Client(models=sys.argv[1]); import cloud_runtime.server;"
        "print([m for m in sys.modules if 'telemetry' in m])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_without_opentelemetry_the_error_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import sdk\n"
        "sdk.Client(models=sys.argv[1])\n"
        "try: sdk.Client(models=sys.argv[1], telemetry=True)\n"
        "except sdk.ConfigError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "nearfar[telemetry]" in done.stdout


def test_the_configuration_turns_it_on():
    assert parse_config("[telemetry]\nenabled = true").telemetry
    assert not parse_config("").telemetry
    with pytest.raises(ConfigError):
        parse_config('[telemetry]\nenabled = "yes"')


@pytest.mark.parametrize("kind", ["infer", "generate"])
def test_a_message_of_an_older_client_has_no_trace(kind):
    from tests.support import wire as samples

    message = getattr(samples, kind)()
    data = b"".join(encode(message, ()))
    length = int.from_bytes(data[:4], "little")
    header = bytearray(data[4 : 4 + length])
    assert header[-2:] == b"\xc4\x00"
    assert 0x90 < header[0] <= 0x9F
    header[0] -= 1
    old = bytes(header[:-2])
    padding = bytes(-(4 + len(old)) % 8)
    assert decode(len(old).to_bytes(4, "little") + old + padding, LIMITS) == (message, ())
