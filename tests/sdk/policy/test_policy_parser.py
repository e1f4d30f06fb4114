from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import ConfigError
from sdk.policy import Policy, load_policy, parse_policy
from sdk.policy.model import DEFAULT_CLASSES

RULE = 'version = 1\n[[rule]]\nid = "clinic-2"\nwhen = { sensitivity = "personal" }\n'
GOOD = RULE + 'effect = "edge_only"\n'


def cloud_rule(line: str) -> str:
    return RULE + 'effect = "cloud_ok"\n' + line


def with_when(when: str) -> str:
    return f'version = 1\n[[rule]]\nid = "clinic-2"\nwhen = {when}\neffect = "deny"\n'


def test_parsing_twice_gives_the_same_policy_and_hash() -> None:
    assert parse_policy(GOOD) == parse_policy(GOOD)
    assert len(parse_policy(GOOD).hash) == 64


def test_layout_and_comments_do_not_change_the_hash_but_meaning_does() -> None:
    spaced = GOOD.replace("\n", "  # a comment\n\n").replace('"personal"', '["personal"]')
    assert parse_policy(spaced, source="elsewhere.toml").hash == parse_policy(GOOD).hash
    assert parse_policy(GOOD.replace("edge_only", "deny")).hash != parse_policy(GOOD).hash
    assert parse_policy(GOOD.replace('"personal"', '"secret"')).hash != parse_policy(GOOD).hash


def test_classes_have_a_default_order_and_can_be_extended() -> None:
    assert parse_policy(GOOD).classes == DEFAULT_CLASSES
    own = parse_policy(
        'version = 1\nclasses = ["open", "ward", "genome"]\n[[rule]]\nid = "a"\n'
        'when = { sensitivity = { at_least = "ward" } }\neffect = "edge_only"'
    )
    assert own.rules[0].when.sensitivity == ("ward", "genome")
    assert own.strictest == "genome"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('"personal"', ("personal",)),
        ('["secret", "personal", "secret"]', ("personal", "secret")),
        ('{ at_least = "personal" }', ("personal", "secret")),
        ('{ at_most = "internal" }', ("public", "internal")),
        ('{ at_least = "internal", at_most = "personal" }', ("internal", "personal")),
    ],
)
def test_sensitivity_is_one_class_a_list_or_a_range(written: str, meant: tuple[str, ...]) -> None:
    policy = parse_policy(with_when(f"{{ sensitivity = {written} }}"))
    assert policy.rules[0].when.sensitivity == meant


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("version = ", "", ["not valid TOML"]),
        ("", "version", ["missing", "version = 1"]),
        ("version = 2", "version", ["version = 1"]),
        ("version = true", "version", ["version = 1"]),
        ("version = 1\nrules = []", "rules", ["Did you mean 'rule'"]),
        ("version = 1\nclasses = []", "classes", ["least to the most strict"]),
        ('version = 1\nclasses = ["a", "a"]', "classes", ["twice"]),
        ('version = 1\nclasses = ["a b"]', "classes", ["not a name"]),
        ("version = 1\n[rule]\nid = 'a'", "rule", ["[[rule]]"]),
        (RULE, "effect", ["'clinic-2'", "missing", "edge_only"]),
        (RULE + 'efect = "deny"', "efect", ["'clinic-2'", "Did you mean 'effect'"]),
        (RULE + 'effect = "edge-only"', "effect", ["Did you mean 'edge_only'"]),
        (RULE + "effect = 3", "effect", ["must be a string"]),
        (RULE + 'effect = "redact"', "effect", ['transform = ["redact"]']),
        (RULE + 'effect = "require"', "effect", ["require = {"]),
        (GOOD + 'transform = ["redact"]', "transform", ["no meaning", "cloud_ok"]),
        (GOOD + "edge = false", "edge", ["no meaning"]),
        (cloud_rule("edge = 1"), "edge", ["true or false"]),
        (cloud_rule('transform = ["redcat"]'), "transform", ["Did you mean 'redact'"]),
        (cloud_rule('require = { paddin = "off" }'), "require.paddin", ["'padding'"]),
        (cloud_rule('require = { padding = "full" }'), "require.padding", ["balanced"]),
        (cloud_rule("require = 1"), "require", ["must be a table"]),
        ('version = 1\n[[rule]]\neffect = "deny"', "id", ["rule 1", "missing"]),
        ('version = 1\n[[rule]]\nid = "a b"\nwhen = {}\neffect = "deny"', "id", ["not a name"]),
        ('version = 1\n[[rule]]\nid = "built-in"\nwhen = {}\neffect = "deny"', "id", ["reserved"]),
        ('version = 1\n[[rule]]\nid = "a"\neffect = "deny"', "when", ["when = {}"]),
        (GOOD + GOOD.removeprefix("version = 1\n"), "id", ["rule 2", "earlier rule"]),
        (with_when('{ sensitvity = "secret" }'), "when.sensitvity", ["'sensitivity'"]),
        (with_when('{ sensitivity = "persnal" }'), "when.sensitivity", ["'personal'"]),
        (with_when('{ sensitivity = { at_leas = "secret" } }'), "when.sensitivity.at_leas",
         ["'at_least'"]),
        (with_when("{ sensitivity = {} }"), "when.sensitivity", ["empty"]),
        (with_when('{ sensitivity = { at_least = "secret", at_most = "public" } }'),
         "when.sensitivity", ["Exchange"]),
        (with_when('{ model = "assist*" }'), "when.model", ["wildcard"]),
        (with_when("{ model = [] }"), "when.model", ["empty list"]),
        (with_when("{ model = 3 }"), "when.model", ["list of strings"]),
        (with_when('{ tenant = " a" }'), "when.tenant", ["space"]),
    ],
)  # fmt: skip
def test_each_mistake_names_file_rule_key_and_fix(text: str, field: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_policy(text, source="clinic.toml")
    message = str(caught.value)
    assert message.startswith("clinic.toml: ")
    assert caught.value.field == field
    assert caught.value.fix
    for word in words:
        assert word in message


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_policy(tmp_path / "policy.toml")


def test_a_huge_or_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_policy(path)
    path.write_bytes(b"#" * (1 << 21))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_policy(path)


def test_a_file_loads_like_its_text(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(GOOD)
    assert load_policy(path).hash == parse_policy(GOOD).hash


PIECES = st.sampled_from(
    ["version = 1\n", "[[rule]]\n", 'id = "a"\n', "when = {}\n", 'effect = "deny"\n', "[rule]\n",
     "when = { sensitivity = 1 }\n", "classes = [1]\n", "x = [[[[", '"', "\ud800", "= 9" * 9,
     "a = " + "9" * 5000 + "\n", "a = " + "[" * 3000 + "\n", "\x00", "# ü\n"]
)  # fmt: skip


@given(st.text() | st.lists(PIECES).map("".join))
def test_any_text_gives_a_policy_or_a_config_error(text: str) -> None:
    try:
        found: Policy | str = parse_policy(text)
    except ConfigError as error:
        found = error.fix
    assert found
