"""The section ``[jobs]``."""

from __future__ import annotations

import pytest

from nearfar.errors import ConfigError
from sdk import JobsConfig
from sdk.config_file import parse_config


def test_the_section_is_read(tmp_path):
    config = parse_config(
        '[jobs]\nfile = "q/jobs.db"\nkey_file = "k"\nmax_jobs = 5\nmax_bytes = 1000\n'
        "max_age_s = 60\nkeep_s = 0.5\nrun = false\n",
        base=tmp_path,
    )
    assert config.jobs == JobsConfig(
        file=tmp_path / "q" / "jobs.db",
        key_file=tmp_path / "k",
        max_jobs=5,
        max_bytes=1000,
        max_age_s=60,
        keep_s=0.5,
        run=False,
    )
    assert parse_config("").jobs is None


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "jobs.file"),
        ("file = 3", "jobs.file"),
        ('file = "q"\nmax_jobs = 0', "jobs.max_jobs"),
        ('file = "q"\nmax_jobs = true', "jobs.max_jobs"),
        ('file = "q"\nmax_bytes = 1.5', "jobs.max_bytes"),
        ('file = "q"\nmax_age_s = "1"', "jobs.max_age_s"),
        ('file = "q"\nkeep_s = inf', "jobs.keep_s"),
        ('file = "q"\nkeep_s = -1', "jobs.keep_s"),
        ('file = "q"\nrun = 1', "jobs.run"),
        ('file = "q"\nkey = "0000"', "jobs.key"),
    ],
)
def test_what_is_wrong_is_named(text, field):
    with pytest.raises(ConfigError) as caught:
        parse_config(f"[jobs]\n{text}\n")
    assert caught.value.field == field
    assert caught.value.fix


def test_a_key_and_a_key_file_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="key_file"):
        JobsConfig(file=tmp_path / "q", key=bytes(32), key_file=tmp_path / "k")
