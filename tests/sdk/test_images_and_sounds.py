"""Images and sounds on the device and in a real cloud: the same answers, and as little leaves."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import nearfar.cli
from cloud_runtime.models import ServedModels
from edge_runtime import commands as edge_commands
from nearfar.bundle import BundleStore
from nearfar.errors import ConfigError, EngineError, InvalidInput, PolicyDenied
from nearfar.wire import messages as wire
from sdk import Client, commands
from sdk.cascade import commands as cascade_commands
from sdk.quickstart.cloud_process import CloudProcess
from tests.support import tiny
from tests.support.files import CANARY, photo, sound
from tests.support.scripted_cloud import ScriptedCloud, manifest, obliging

pytest.importorskip("onnxruntime")
pytest.importorskip("PIL")

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "how-to" / "classify-images-and-sounds.md").read_text()


def blocks(language: str) -> list[str]:
    """What stands in the how-to between fences of one language; "" is the shell."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
    return [block for named, block in found if named == language]


#: Public classifications may go to the cloud, personal ones stay, others are denied.
POLICY = next(block for block in blocks("toml") if block.startswith("# policy.toml"))
RED, GREEN = (250, 60, 60), (60, 250, 60)
#: Model, what it is given, and what that is.
KNOWN = [
    ("animal", photo(RED), "red"),
    ("animal", photo(GREEN, 40, 9), "green"),
    ("word", sound(0.01), "quiet"),
    ("word", sound(0.9, channels=2), "loud"),
    ("mood", "good day", "glad"),
    ("mood", "in no way", "sad"),
]
BAD = [
    ("animal", b"", "no image"),
    ("animal", b"\x89PNG\r\n\x1a\n but no more", "no image"),
    ("animal", photo(RED)[:3000], "no image"),
    ("animal", sound(0.5), "no image"),
    ("word", b"", "no WAV file"),
    ("word", sound(0.5, 0), "has 0 samples"),
    ("word", sound(0.5, 79), "79 samples, the model takes 80"),
    ("word", sound(0.5, rate=8000), "8000 samples in a second"),
    ("word", photo(RED), "no WAV file"),
    ("word", "a text", "takes bytes, and data is text"),
    ("mood", b"good day", "takes text, and data is bytes"),
    ("mood", "good \ud800", "surrogates"),
]
MODES = ["edge_only", "cloud_only", "auto"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store, a running cloud that serves it, and what an app is configured with."""
    root = tmp_path_factory.mktemp("world")
    store = root / ".nearfar" / "models"
    tiny.write_tiny_image_bundle(store / "animal", "animal")
    tiny.write_tiny_sound_bundle(store / "word", "word")
    tiny.write_tiny_text_bundle(store / "mood")
    (root / "policy.toml").write_text(POLICY)
    cloud = CloudProcess(state=root / "cloud", models=store, log=root / "cloud.log")
    cloud.provision()
    cloud.start()
    (root / "nearfar.toml").write_text(
        f"""
[models]
store = ".nearfar/models"
[cloud.main]
url = "{cloud.url}"
identity = "{cloud.pin}"
credentials = "file:cloud/client-key.txt"
ca_file = "cloud/ca.pem"
[policy]
file = "policy.toml"
[jobs]
file = "jobs/jobs.db"
[cascade]
calibrations = "calibrations"
"""
    )
    yield root
    cloud.stop()


@pytest.fixture(scope="module")
def client(world):
    with Client.from_config(world / "nearfar.toml", sensitivity="public") as opened:
        yield opened


@pytest.mark.parametrize(("model", "data", "label"), KNOWN)
def test_both_routes_give_the_same_label(client, model, data, label, tmp_path):
    here = client.classify(model, data, mode="edge_only", top_k=3)
    given = data
    if isinstance(data, bytes):
        given = tmp_path / "file"
        given.write_bytes(data)
    there = client.classify(model, given, mode="cloud_only", top_k=3)
    assert (here.label, there.label) == (label, label)
    assert (here.variant, there.variant) == ("int8", "fp32")
    assert dict(here.top) == pytest.approx(dict(there.top), abs=0.05)
    assert here.bytes_sent == 0 < there.bytes_sent
    assert client.classify(model, data).label == label


@pytest.mark.parametrize(("model", "data", "message"), BAD)
@pytest.mark.parametrize("mode", MODES)
def test_what_the_model_cannot_take_is_refused_alike_and_stays(
    client, world, mode, model, data, message
):
    client.warm_up(model)
    log = (world / "cloud.log").read_text()
    with pytest.raises(InvalidInput, match=message) as caught:
        client.classify(model, data, mode=mode)
    assert caught.value.fix
    assert (world / "cloud.log").read_text() == log


def test_data_classes_hold_for_images_and_sounds(client):
    for model, data, label in KNOWN:
        result = client.classify(model, data, sensitivity="personal", mode="prefer_cloud")
        assert (result.label, result.route.name, result.bytes_sent) == (label, "edge", 0)
        with pytest.raises(PolicyDenied):
            client.classify(model, data, sensitivity="personal", mode="cloud_only")
        with pytest.raises(PolicyDenied):
            client.classify(model, data, sensitivity="secret")


def test_nothing_of_the_input_is_logged(client, world, caplog):
    caplog.set_level(logging.DEBUG)
    for mode in MODES:
        for model, data, label in KNOWN:
            assert client.classify(model, data, mode=mode).label == label
        for model, data, _ in BAD:
            with pytest.raises(InvalidInput):
                client.classify(model, data, mode=mode)
    assert CANARY not in caplog.text
    told = (world / "cloud.log").read_text()
    assert "model=animal" in told
    assert CANARY not in told


def test_sounds_of_any_length_are_decided_anew_and_images_are_not(world):
    with Client(models=world / ".nearfar" / "models") as client:
        for _ in range(3):
            for count in (100, 70_000):
                assert client.classify("word", sound(0.9, count)).label == "loud"
            client.classify("animal", photo(RED))
        assert [kind[1] for kind in client._plans._of_items] == ["animal"]
        size = client.classify("animal", photo(RED)).decision.inputs.size
        assert size.upload_bytes == 3 * 10 * 10 < len(photo(RED))


def test_a_job_waits_with_an_image_and_is_answered(client):
    jobs = [
        client.submit(model, data=data, deferrable=True, top_k=2) for model, data, _ in KNOWN[::2]
    ]
    assert [job.result(timeout_s=30).label for job in jobs] == ["red", "quiet", "glad"]
    broken = client.submit("animal", data=b"no image", deferrable=True)
    with pytest.raises(InvalidInput, match="no image"):
        broken.result(timeout_s=30)


def run(command, *arguments) -> int:
    return nearfar.cli.run(command, [str(a) for a in arguments], program="nearfar")


def test_the_commands_take_images_and_sounds_and_name_the_one_that_is_none(
    world, tmp_path, capsys, monkeypatch
):
    (tmp_path / "red.jpg").write_bytes(photo(RED))
    (tmp_path / "long.wav").write_bytes(sound(0.9, 5000))
    (tmp_path / "short.wav").write_bytes(sound(0.01, 100))
    (tmp_path / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    config = ("-c", world / "nearfar.toml", "--sensitivity", "public")
    models = ("--models", world / ".nearfar" / "models")
    for mode in ("edge_only", "cloud_only"):
        assert run(commands.infer, "animal", "red.jpg", *config, "--mode", mode) == 0
        assert capsys.readouterr().out.startswith("red.jpg: red 9")
    assert run(commands.explain, "animal", *config) == 0
    assert run(commands.explain, "word", "--file", "long.wav", *config) == 0
    assert run(commands.explain, "mood", *config) == 0
    assert run(commands.explain, "mood", "--text", "good day", *config) == 0
    capsys.readouterr()
    assert run(commands.infer, "mood", "-t", "good day", "-t", "in no way", *config) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[-2] for line in told] == ["sad", "glad"]  # the second best of each
    assert run(commands.infer, "animal", "red.jpg", "notes.txt", *config) == 2
    out, err = capsys.readouterr()
    assert out.startswith("red.jpg: ")
    assert "notes.txt: The data is no image" in err
    out = tmp_path / "scores.npz"
    assert run(edge_commands.run, "word", "long.wav", "short.wav", *models, "-o", out) == 0
    told = capsys.readouterr().out
    assert told.startswith("long.wav: loud 1.000, quiet 0.000\nshort.wav: quiet 0.")
    assert commands.load_tensors(out)["scores"].shape == (2, 2)
    assert run(edge_commands.run, "animal", "red.jpg", "notes.txt", *models) == 2
    assert "notes.txt: The data is no image" in capsys.readouterr().err


def test_a_cascade_is_calibrated_on_a_folder_of_images(world, client, capsys):
    folder = world / "images"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.jpg").write_bytes(photo((200, 3 * number, 60), 20 + number, 30))
    options = ("-c", world / "nearfar.toml", "--sensitivity", "public", "--min-agreement", 0.5)
    calibrate = cascade_commands.calibrate
    assert run(calibrate, "animal", "--data", folder, "--horizon", 0, *options) == 0
    assert capsys.readouterr().out.split()[:2] == ["samples", "40"]
    result = client.classify("animal", photo(RED), min_agreement=0.5)
    assert (result.label, result.agreement.outcome) == ("red", "kept")
    (folder / "notes.txt").write_text("no image")
    assert run(calibrate, "animal", "--data", folder, *options) == 2
    err = " ".join(capsys.readouterr().err.split())  # as it was before it was broken into lines
    assert f"{folder}/notes.txt: The data is no image" in err


def test_of_an_image_and_a_sound_only_what_the_model_sees_is_sent(tmp_path):
    sent: list[bytes] = []

    def look(session, message, tensors):
        if isinstance(message, wire.Infer):
            sent.extend(bytes(item) for item in tensors[0])
        yield from obliging(session, message, tensors)

    offered = [
        manifest("animal", "classification", preprocessing=tiny.IMAGE, labels=tiny.COLOURS),
        manifest("word", "classification", preprocessing=tiny.AUDIO, labels=tiny.LOUDNESS),
    ]
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    with ScriptedCloud(tmp_path / "state", models=offered) as cloud:
        cloud.behaviour = look
        with Client(cloud=cloud.config(), policy=policy, sensitivity="public") as client:
            for model, data, _ in KNOWN[:4]:
                client._run(client._classify_request(model, data, 1, {}))
    for (model, data, _), part in zip(KNOWN[:4], sent, strict=True):
        assert CANARY.encode() in data
        assert CANARY.encode() not in part
        if model == "animal":
            assert len(part) < 1000


def test_without_pillow_the_fix_is_said_before_anything_is_sent_or_served(
    world, client, monkeypatch
):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"nearfar\[images\]"):
        client.classify(*KNOWN[0][:2], mode="cloud_only")
    with pytest.raises(EngineError, match=r"nearfar\[images\]"):
        ServedModels.load(BundleStore(world / ".nearfar" / "models"), names=["animal"])


def test_the_page_about_it_and_its_example_do_what_they_say(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    Path("photo.jpg").write_bytes(photo(RED))
    for name in ("yes.wav", "no.wav"):
        Path(name).write_bytes(sound(0.9))
    Path("photos").mkdir()
    for number in range(30):
        Path("photos", f"{number}.jpg").write_bytes(photo((8 * number, 200, 30), 12, 12))
    known = {
        "infer": commands.infer,
        "explain": commands.explain,
        "calibrate": cascade_commands.calibrate,
        "edge": edge_commands.run,
    }
    lines = [shlex.split(line) for block in blocks("") for line in block.splitlines()]
    asked = [words for words in lines if words[1] != "convert"]
    assert len(asked) == 7
    for _, command, *words in asked:
        assert run(known[command], *(words[1:] if command == "edge" else words)) == 0
    assert "fp32" in capsys.readouterr().err
    names: dict[str, object] = {}  # one block goes on where another ended
    for block in blocks("python"):
        exec(compile(block, "how-to", "exec"), names)
    out = capsys.readouterr().out
    assert "(('red'," in out
    assert "policy rule customers keeps personal data on the device" in out
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "see_and_hear.py", "--sensitivity", "public",
         "animal", "photo.jpg", "word", "yes.wav"],
        capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.count("red 9") == 2
    assert done.stdout.count(", 0 B sent") == 2
    assert done.stdout.count(", cloud · ") == 2
