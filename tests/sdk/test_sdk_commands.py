"""The commands infer, chat, explain and doctor, as a person runs them."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import nearfar.cli
from nearfar.wire import messages as wire
from sdk import commands, doctor
from tests.support.scripted_cloud import ScriptedCloud

POLICY = """
version = 1
[[rule]]
id = "open"
when = { sensitivity = "public" }
effect = "cloud_ok"
"""


@pytest.fixture
def cloud(tmp_path):
    with ScriptedCloud(tmp_path / "state") as server:
        yield server


@pytest.fixture
def config(cloud, tmp_path):
    path = tmp_path / "nearfar.toml"
    settings = cloud.config()
    (tmp_path / "policy.toml").write_text(POLICY)
    path.write_text(
        f"""
[cloud.main]
url = "{settings.url}"
identity = "{settings.identity}"
credentials = "{settings.credentials}"
ca_file = "{settings.ca_file}"

[policy]
file = "policy.toml"
"""
    )
    return path


def run(command, *arguments) -> int:
    return nearfar.cli.run(command, [str(a) for a in arguments], program="nearfar")


def test_chat_streams_the_answer_to_stdout_and_the_route_to_stderr(config, capsys):
    status = run(
        commands.chat, "story", "Hello", "-c", config, "--sensitivity", "public",
        "--max-new-tokens", 5,
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert status == 0
    assert out == "w0 w1 w2 w3 w4 \n"
    assert err.startswith('cloud · "')
    assert "5 tokens" in err


def test_infer_runs_tensors_from_a_file_into_a_file(config, tmp_path, capsys):
    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    np.savez(tmp_path / "in.npz", x=x)
    out = tmp_path / "out.npz"
    status = run(
        commands.infer, "tensor", tmp_path / "in.npz", "-o", out, "-c", config,
        "--sensitivity", "public",
    )  # fmt: skip
    assert status == 0
    with np.load(out) as written:
        assert np.array_equal(written["y"], x)
    assert "y float32[1, 4]" in capsys.readouterr().out


def test_infer_embeds_texts(config, capsys):
    status = run(
        commands.infer, "embedder", "-t", "near", "-t", "far", "-c", config,
        "--sensitivity", "public",
    )  # fmt: skip
    assert status == 0
    assert "'near': +1.0000" in capsys.readouterr().out


def test_infer_refuses_a_file_with_pickled_objects(config, tmp_path, capsys):
    np.savez(tmp_path / "in.npz", x=np.array([{}], dtype=object))
    assert run(commands.infer, "tensor", tmp_path / "in.npz", "-c", config) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_explain_prints_both_candidates_and_sends_nothing(config, cloud, capsys):
    status = run(
        commands.explain, "story", "--prompt", "x", "-c", config, "--sensitivity", "public"
    )
    out = capsys.readouterr().out
    assert status == 0
    assert "edge" in out
    assert "cloud" in out
    assert cloud.connections == 0


def test_explain_ends_with_an_error_when_there_is_no_route(config, cloud, capsys):
    assert run(commands.explain, "story", "--prompt", "x", "-c", config) == 1
    out, err = capsys.readouterr()
    assert "no route" in out
    assert "error:" in err
    assert cloud.connections == 0


@pytest.mark.parametrize("size", [("--tokens", 200), ("--bytes", 1500)])
def test_explain_takes_sizes_instead_of_content(config, cloud, capsys, size):
    status = run(
        commands.explain, "story", *size, "--max-new-tokens", 64, "--deadline-ms", 60_000,
        "--connect", "--json", "-c", config, "--sensitivity", "public",
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert (told["route"], told["endpoint"], told["meets_deadline"]) == ("cloud", "main", True)
    assert told["reason"].startswith("cloud: ")
    assert told["asked"]["max_new_tokens"] == 64
    assert told["asked"]["input_tokens"] == (200 if size[0] == "--tokens" else 376)
    assert told["asked"]["upload_bytes"] == (800 if size[0] == "--tokens" else 1500)
    assert 0 < told["asked"]["remaining_ms"] <= 60_000
    assert [one["route"] for one in told["candidates"]] == ["edge", "cloud"]
    assert [one["eligible"] for one in told["candidates"]] == [False, True]
    assert told["policy"]["rules"] == ["open"]
    assert cloud.saw(wire.Infer) == cloud.saw(wire.Generate) == []


def test_explain_without_a_route_says_so_in_json_too(config, capsys):
    assert run(commands.explain, "story", "--tokens", 9, "--json", "-c", config) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["route"] is None
    assert told["error"]["code"] == "policy_denied"


def test_explain_lists_every_cloud_and_what_it_costs(config, tmp_path, capsys):
    with ScriptedCloud(tmp_path / "second") as second:
        settings = second.config()
        config.write_text(
            config.read_text().replace("[policy]", "cost_per_request = 0.25\n\n[policy]")
            + f"""
[cloud.second]
url = "{settings.url}"
identity = "{settings.identity}"
credentials = "{settings.credentials}"
ca_file = "{settings.ca_file}"
cost_per_request = 0.125

[routing]
objective = "cost"
"""
        )
        ask = ("tensor", "--bytes", 32, "--connect", "-c", config, "--sensitivity", "public")
        assert run(commands.explain, *ask) == 0
        table = capsys.readouterr().out
        assert run(commands.explain, *ask, "--json") == 0
        told = json.loads(capsys.readouterr().out)
    rows = {name: line for line in table.splitlines() for name in ("main", "second")
            if line.startswith(f"cloud {name} ")}  # fmt: skip
    assert "0.125" in rows["second"]
    assert "0.25" in rows["main"]
    assert told["endpoint"] == "second"
    assert {one["endpoint"]: one["cost"] for one in told["candidates"]} == {
        None: None, "main": 0.25, "second": 0.125,
    }  # fmt: skip


def test_explain_takes_a_size_or_an_input(config, tmp_path, capsys):
    ask = ("story", "--tokens", 9, "--prompt", "x", "-c", config)
    assert run(commands.explain, *ask) == 2
    assert "input_tokens" in capsys.readouterr().err
    assert run(commands.explain, "story", "--bytes", -1, "-c", config) == 2
    assert "upload_bytes is -1" in capsys.readouterr().err


def test_a_missing_configuration_is_named(tmp_path, capsys):
    assert run(commands.chat, "story", "x", "-c", tmp_path / "none.toml") == 2
    assert "none.toml" in capsys.readouterr().err


def findings(path):
    return {f.subject: f for f in doctor.examine(path)}


def test_doctor_reaches_the_cloud_and_sends_it_nothing_of_the_app(config, cloud):
    found = findings(config)
    assert found["cloud"].status == "ok"
    assert "story" in found["cloud"].detail
    assert found["policy"].status == "ok"
    assert cloud.saw(wire.Infer) == []
    assert {f.status for f in found.values()} <= {"ok", "warn"}


def test_doctor_says_what_is_wrong_and_how_to_mend_it(config, tmp_path, capsys):
    (tmp_path / "policy.toml").write_text("version = 99\n")
    config.write_text(config.read_text().replace("wss://localhost", "wss://localhost:1/x?"))
    assert run(doctor.doctor, "-c", config, "--json") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    failed = [line for line in lines if line["status"] == "fail"]
    assert failed
    assert all(line["fix"] for line in failed)


def test_a_cloud_that_is_away_is_a_warning_while_the_device_can_answer(config, tmp_path):
    (tmp_path / "store").mkdir()
    url = config.read_text().partition('url = "')[2].partition('"')[0]
    gone = config.read_text().replace(url, "wss://localhost:1/v1/nearfar")
    config.write_text(gone)
    assert findings(config)["cloud"].status == "fail"
    config.write_text(gone + '\n[models]\nstore = "store"\n')
    assert findings(config)["cloud"].status == "warn"


def test_doctor_without_a_configuration_warns_only(tmp_path, capsys):
    assert run(doctor.doctor, "-c", tmp_path / "none.toml") == 0
    assert "none.toml" in capsys.readouterr().out


def test_command_modules_import_light():
    heavy = ("numpy", "onnxruntime", "websockets", "cryptography", "asyncio", "sdk.client")
    code = (
        f"import sys, sdk.commands, sdk.doctor; print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "['asyncio']")


def test_infer_says_what_became_of_a_stated_agreement(config, tmp_path, capsys):
    np.savez(tmp_path / "in.npz", x=np.ones((1, 4), np.float32))
    status = run(
        commands.infer, "tensor", tmp_path / "in.npz", "-c", config, "--sensitivity", "public",
        "--min-agreement", 0.98,
    )  # fmt: skip
    assert status == 0
    assert "agreement 0.98: cloud" in capsys.readouterr().err
