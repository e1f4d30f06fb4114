"""The examples run as their own documentation says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nearfar.bundle.manifest import HeadTailPreprocessing
from tests.support.scripted_cloud import EMBEDDING, STORY, ScriptedCloud, manifest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CLASSIFIER = manifest(
    "file-type",
    "classification",
    preprocessing=HeadTailPreprocessing(
        head_bytes=8, tail_bytes=8, block_bytes=16, padding_value=256
    ),
    labels=("text", "image", "other"),
    label_output="vectors",
)


@pytest.fixture
def config(tmp_path):
    with ScriptedCloud(tmp_path / "state", models=(CLASSIFIER, EMBEDDING, STORY)) as cloud:
        settings = cloud.config()
        (tmp_path / "policy.toml").write_text(
            'version = 1\n[[rule]]\nid = "open"\n'
            'when = { sensitivity = "public" }\neffect = "cloud_ok"\n'
        )
        path = tmp_path / "nearfar.toml"
        path.write_text(
            f'[cloud.main]\nurl = "{settings.url}"\nidentity = "{settings.identity}"\n'
            f'credentials = "{settings.credentials}"\nca_file = "{settings.ca_file}"\n'
            '[policy]\nfile = "policy.toml"\n'
        )
        yield path


def run(name: str, *arguments: object, said: str = "") -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        input=said,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_classify_file_names_the_kind_and_the_route(config):
    out = run("classify_file.py", "--config", config, "--sensitivity", "public", config)
    assert "text 100%" in out
    assert 'cloud · "' in out


def test_semantic_search_prints_the_best_paragraphs(config, tmp_path):
    (tmp_path / "text.txt").write_text("one two three " * 6 + "\n\n" + "four five six " * 6)
    out = run(
        "semantic_search.py", "--config", config, "--model", "embedder",
        "--sensitivity", "public", "what?", tmp_path / "text.txt",
    )  # fmt: skip
    assert "four five six" in out
    assert "2 paragraphs" in out


def test_chat_answers_until_the_input_ends_and_survives_a_refusal(config):
    options = ("--config", config, "--model", "story", "--max-new-tokens", 4)
    assert "w0 w1 w2 w3" in run(
        "chat.py", *options, "--sensitivity", "public", said="hello\nand now?\n"
    )
    assert "PolicyDenied" in run("chat.py", *options, "--sensitivity", "secret", said="hello\n")
