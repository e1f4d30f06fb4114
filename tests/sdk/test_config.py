from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import ConfigError
from sdk.config import CloudConfig, Config, RoutingConfig
from sdk.config_file import load_config, parse_config
from sdk.routing.objectives import Price

PIN = "nf1:9k2fexample"
GOOD = f"""
[models]
store = "models"

[cloud.main]
url = "wss://inference.example.com/v1/nearfar"
identity = "{PIN}"
credentials = "file:client-key.txt"
ca_file = "ca.pem"
region = "eu"

[routing]
objective = "quality"
mode = "prefer_edge"
deadline_ms = 800

[policy]
file = "policy.toml"
default_sensitivity = "internal"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("ca.pem", "policy.toml"):
        (tmp_path / name).write_text("")
    (tmp_path / "client-key.txt").write_text("key-of-the-clinic\n")
    (tmp_path / "client-key.txt").chmod(0o600)
    (tmp_path / "nearfar.toml").write_text(GOOD)
    return tmp_path


def test_a_complete_file_gives_all_settings(folder: Path) -> None:
    config = load_config(folder / "nearfar.toml")
    assert config.models_store == folder / "models"
    assert config.policy_file == folder / "policy.toml"
    assert config.default_sensitivity == "internal"
    assert config.routing == RoutingConfig(
        mode="prefer_edge", objective="quality", deadline_ms=800.0
    )
    assert config.cloud is not None
    assert config.cloud.name == "main"
    assert config.cloud.ca_file == folder / "ca.pem"
    assert config.cloud.region == "eu"
    assert config.cloud.token() == "key-of-the-clinic"


def test_an_empty_file_is_a_device_without_models_cloud_or_policy() -> None:
    assert parse_config("") == Config(source="nearfar.toml")
    assert parse_config("").cloud is None


def test_paths_are_relative_to_the_file_and_the_home_is_expanded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder.parent)
    (folder / "nearfar.toml").write_text('[models]\nstore = "~/models"\n')
    assert load_config("~/nearfar.toml").models_store == folder / "models"
    (folder / "nearfar.toml").write_text('[models]\nstore = "models"\n')
    assert load_config(f"{folder.name}/nearfar.toml").models_store == folder / "models"


@pytest.mark.parametrize(
    ("old", "new", "field", "words"),
    [
        ("[models]", "[model]", "model", "Did you mean 'models'"),
        ('store = "models"', "store = 1", "models.store", "path in quotes"),
        ("wss://", "ws://", "cloud.main.url", "only wss"),
        ("wss://", "wss:", "cloud.main.url", "has no host"),
        ("example.com", "example.com:99999", "cloud.main.url", "not a URL"),
        ('url = "wss://inference.example.com/v1/nearfar"', "", "cloud.main.url", "missing"),
        (PIN, "", "cloud.main.identity", "non-empty"),
        (PIN, "9k2f", "cloud.main.identity", "nf1:"),
        ("file:client-key.txt", "keyring:nearfar/main", "cloud.main.credentials", "keyring"),
        ("ca.pem", "no.pem", "cloud.main.ca_file", "no such file"),
        ("regio", "regoi", "cloud.main.regoin", "Did you mean 'region'"),
        ('region = "eu"', 'attestation = "plug_in"', "cloud.main.attestation", "MODULE:NAME"),
        ('region = "eu"', 'attestation = "a.b:"', "cloud.main.attestation", "MODULE:NAME"),
        ('region = "eu"', 'attestation = "a b:c"', "cloud.main.attestation", "MODULE:NAME"),
        ('region = "eu"', 'attestation = ""', "cloud.main.attestation", "MODULE:NAME"),
        ('region = "eu"', "attestation = false", "cloud.main.attestation", "MODULE:NAME"),
        ("[cloud.main]", "[cloud]", "cloud", "[cloud.main]"),
        ('region = "eu"', "power_w = true", "cloud.main.power_w", "without quotes"),
        ('region = "eu"', "cost_per_request = -1", "cloud.main.cost_per_request", "0 or more"),
        ("[routing]", "[edge]\npower_w = inf\n[routing]", "edge.power_w", "0 or more"),
        ("[routing]", "[edge]\npower = 1\n[routing]", "edge.power", "Did you mean 'power_w'"),
        ("[routing]", "[routing]\nretry_budget = 2", "routing.retry_budget", "0.2"),
        ("[routing]", "[routing]\nweights = 1", "routing.weights", "must be a table"),
        ("[routing]", "[routing]\nweights = {cost = -1}", "routing.weights", "from 0 to 100"),
        ("[routing]", "[routing]\nweights = {costs = 1}", "routing.weights.costs", "'cost'"),
        ('"quality"', '"qualty"', "routing.objective", "Did you mean 'quality'"),
        ('"quality"', '"energy"', "routing.objective", "power_w"),
        ('"quality"', '"cost"', "routing.objective", "cost_per_request"),
        ('"prefer_edge"', '"edge"', "routing.mode", "edge_only"),
        ('"prefer_edge"', "true", "routing.mode", "non-empty string"),
        ("800", '"800"', "routing.deadline_ms", "without quotes"),
        ("800", "true", "routing.deadline_ms", "without quotes"),
        ("800", "0", "routing.deadline_ms", "positive"),
        ("800", "nan", "routing.deadline_ms", "positive"),
        ("800", "inf", "routing.deadline_ms", "positive"),
        ("800", "9" * 400, "routing.deadline_ms", "too large"),
        ("policy.toml", "none.toml", "policy.file", "no such file"),
        ('"internal"', '"in ternal"', "policy.default_sensitivity", "not a name"),
    ],
)  # fmt: skip
def test_each_mistake_names_file_key_and_fix(
    folder: Path, old: str, new: str, field: str, words: str
) -> None:
    assert old in GOOD
    path = folder / "nearfar.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert caught.value.field == field
    assert words in message
    assert caught.value.fix


def test_a_key_pasted_into_the_file_is_refused_and_not_shown() -> None:
    for bad in (
        GOOD.replace("file:client-key.txt", "sk-very-secret"),
        GOOD.replace("wss://", "wss://me:sk-very-secret@"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config(bad.replace('ca_file = "ca.pem"', ""))
        assert "very-secret" not in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(tmp_path / "nearfar.toml")


def cloud(credentials: str) -> CloudConfig:
    return CloudConfig(url="wss://h/v1/nearfar", identity=PIN, credentials=credentials)


def test_credentials_are_read_when_needed_and_hidden_from_repr(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = cloud("env:NEARFAR_TEST_KEY")
    with pytest.raises(ConfigError, match="NEARFAR_TEST_KEY is not set"):
        config.token()
    monkeypatch.setenv("NEARFAR_TEST_KEY", "secret-key")
    assert config.token() == "secret-key"
    assert "secret-key" not in repr(config)
    assert "NEARFAR_TEST_KEY" not in repr(config)
    with pytest.raises(ConfigError, match="cannot be read"):
        cloud(f"file:{tmp_path / 'none'}").token()
    assert cloud("").token() == ""


def test_a_file_that_holds_no_key_is_refused_without_showing_it(tmp_path: Path) -> None:
    path = tmp_path / "key"
    for content in (b"", b"two words-of-a-secret", b"\xffsecret", b"secret" * 10_000):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="does not hold an API key") as caught:
            cloud(f"file:{path}").token()
        assert "secret" not in str(caught.value)


def test_a_key_file_that_others_can_read_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "key"
    path.write_text("secret-key")
    path.chmod(0o644)
    assert cloud(f"file:{path}").token() == "secret-key"
    assert "chmod 600" in caplog.text
    assert "secret-key" not in caplog.text


def test_settings_made_in_code_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="only wss") as caught:
        CloudConfig(url="http://h", identity=PIN)
    assert caught.value.field == "url"
    with pytest.raises(ConfigError, match="positive"):
        RoutingConfig(deadline_ms=-1)
    with pytest.raises(ConfigError, match="'objective' is 'speed'"):
        RoutingConfig(objective="speed")  # type: ignore[arg-type]


PIECES = st.sampled_from(
    ["[cloud.a]\n", "[cloud]\n", 'url = "wss://h"\n', f'identity = "{PIN}"\n', "[routing]\n",
     "deadline_ms = 1\n", "deadline_ms = -inf\n", "mode = 3\n", 'url = "wss://[h"\n',
     'store = "~nobody/x"\n', "[models]\n", 'store = "\\u0000"\n', "cloud = 1\n", "a = [",
     "[policy]\n", 'file = "x"\n', 'credentials = "file:"\n', 'credentials = "file:\\u0000"\n']
)  # fmt: skip


@given(st.text() | st.lists(PIECES).map("".join))
def test_any_text_gives_a_config_or_a_config_error(text: str) -> None:
    try:
        found: Config | str = parse_config(text, base=Path(os.sep))
    except ConfigError as error:
        found = error.fix
    assert found


# Tokens.


def test_a_token_is_read_from_its_file_each_time(folder: Path) -> None:
    for name in ("token.txt", "client.key"):
        (folder / name).write_text("first.token.x\n")
        (folder / name).chmod(0o600)
    text = GOOD.replace(
        'credentials = "file:client-key.txt"',
        'token_file = "token.txt"\nkey_file = "client.key"',
    )
    cloud = parse_config(text, base=folder).cloud
    assert cloud is not None
    assert cloud.token_file == folder / "token.txt"
    assert cloud.key_file == folder / "client.key"
    assert cloud.token() == "first.token.x"
    (folder / "token.txt").write_text("second.token.x\n")
    assert cloud.token() == "second.token.x"
    (folder / "token.txt").write_text("two words")
    with pytest.raises(ConfigError, match="'token_file' names does not hold a token") as caught:
        cloud.token()
    assert "two words" not in str(caught.value)
    (folder / "token.txt").unlink()
    with pytest.raises(ConfigError, match=r"the token file .* cannot be read"):
        cloud.token()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"token_file": Path("t")}, "token_file"),
        ({"key_file": Path("k")}, "key_file"),
        ({"token_file": Path("t"), "key_file": Path("k"), "credentials": "env:X"}, "token_file"),
        ({"token_provider": lambda: "", "credentials": "env:X"}, "token_file"),
    ],
)
def test_ways_to_authenticate_are_complete_and_alone(fields: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CloudConfig(url="wss://h/v1/nearfar", identity=PIN, **fields)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert caught.value.fix


KEY = "ed25519:" + "A" * 43 + "="


def test_trusted_keys_are_texts_or_files_beside_the_configuration(folder: Path) -> None:
    (folder / "release.pub").write_text("…")
    config = parse_config(f'[models]\ntrusted_keys = ["{KEY}", "release.pub"]', base=folder)
    assert config.trusted_keys == (KEY, str(folder / "release.pub"))


@pytest.mark.parametrize("value", ["[]", '""', '"release.pub"', "[1]", '[""]', '["missing.pub"]'])
def test_trusted_keys_that_are_none_are_refused(folder: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="trusted_keys"):
        parse_config(f"[models]\ntrusted_keys = {value}", base=folder)


@pytest.mark.parametrize("shaping", ["off", "balanced", "strict"])
def test_shaping_is_one_of_three_levels(shaping: str) -> None:
    config = parse_config(
        f'[cloud.main]\nurl = "wss://h/v1/nearfar"\nidentity = "{PIN}"\nshaping = "{shaping}"\n'
    )
    assert config.cloud is not None
    assert config.cloud.shaping == shaping


def test_shaping_is_balanced_unless_stated() -> None:
    assert CloudConfig(url="wss://h/v1/nearfar", identity=PIN).shaping == "balanced"


@pytest.mark.parametrize("value", ['"on"', '""', "true"])
def test_unknown_shaping_names_the_key(value: str) -> None:
    with pytest.raises(ConfigError, match=r"cloud\.main\.shaping"):
        parse_config(
            f'[cloud.main]\nurl = "wss://h/v1/nearfar"\nidentity = "{PIN}"\nshaping = {value}\n'
        )


def test_confidence_and_state_of_the_router_are_read(tmp_path: Path) -> None:
    config = parse_config('[routing]\nconfidence = 0.8\nstate = "kept.json"\n', base=tmp_path)
    assert config.routing.confidence == 0.8
    assert config.routing.state == tmp_path / "kept.json"


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.1", "true", '"high"'])
def test_a_confidence_that_is_no_probability_is_refused(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(f"[routing]\nconfidence = {value}\n")
    assert caught.value.field.endswith("confidence")


# -- the cascade ---------------------------------------------------------------------------------


def test_agreements_are_stated_for_models_and_share_the_audit(tmp_path):
    text = """
[cascade]
calibrations = "calibrations"
audit = 0.05
[cascade.model.file-type]
min_agreement = 0.98
[cascade.model.digits]
min_agreement = 0.9
audit = 0
require = true
"""
    cascade = parse_config(text, base=tmp_path).cascade
    assert cascade is not None
    assert cascade.calibrations == tmp_path / "calibrations"
    assert cascade.audit == 0.05
    first, second = cascade.models["file-type"], cascade.models["digits"]
    assert (first.min_agreement, first.audit, first.require) == (0.98, 0.05, False)
    assert (second.min_agreement, second.audit, second.require) == (0.9, 0.0, True)
    assert parse_config("").cascade is None


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[cascade]\naudit = 2", "cascade.audit"),
        ('[cascade]\naudit = "1"', "cascade.audit"),
        ("[cascade]\nmodel = 1", "cascade.model"),
        ("[cascade]\nmodels = 1", "cascade.models"),
        ('[cascade]\ncalibrations = ""', "cascade.calibrations"),
        ("[cascade.model.a]", "cascade.model.a.min_agreement"),
        ("[cascade.model.a]\nmin_agreement = 1", "cascade.model.a.min_agreement"),
        ("[cascade.model.a]\nmin_agreement = 0", "cascade.model.a.min_agreement"),
        ("[cascade.model.a]\nmin_agreement = 0.9\naudit = -1", "cascade.model.a.audit"),
        ("[cascade.model.a]\nmin_agreement = 0.9\nrequire = 1", "cascade.model.a.require"),
    ],
)
def test_mistakes_in_the_cascade_are_named(text, field):
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert caught.value.field == field


def test_several_clouds_prices_and_weights_are_read(folder: Path) -> None:
    text = GOOD.replace('objective = "quality"', 'objective = "cost"\nweights = {latency = 0.25}')
    text += f"""
[edge]
power_w = 5
cost_per_1k_output_tokens = 0.001

[cloud.us]
url = "wss://us.example.com/v1/nearfar"
identity = "{PIN}"
region = "us"
cost_per_request = 0.002
"""
    (folder / "nearfar.toml").write_text(text)
    config = load_config(folder / "nearfar.toml")
    assert list(config.clouds) == ["main", "us"]
    assert config.cloud == config.clouds["main"]
    assert config.clouds["main"].price is None
    assert config.clouds["us"].price == Price(cost_per_request=0.002)
    assert config.edge_price == Price(power_w=5.0, cost_per_1k_output_tokens=0.001)
    assert (config.routing.objective, config.routing.weights) == ("cost", {"latency": 0.25})
