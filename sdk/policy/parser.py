"""Policy text (TOML) to `Policy`; every mistake names file, rule, key and fix."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from nearfar.errors import ConfigError
from nearfar.secure.shaping import LEVELS
from sdk.policy.model import (
    BUILT_IN_RULE_ID,
    DEFAULT_CLASSES,
    Condition,
    Effect,
    Policy,
    Requirement,
    Rule,
    Transform,
)
from sdk.toml_table import Table, parse_toml, read_text, suggestion

FORMAT_VERSION = 1
MAX_RULES = 1000
# Ids, classes and regions stand in every decision record, which has 1 KB.
MAX_ID_LENGTH = 48
MAX_CLASS_LENGTH = 24
MAX_REGION_LENGTH = 32
MAX_NAME_LENGTH = 128

EFFECTS: tuple[Effect, ...] = get_args(Effect)
TRANSFORMS: tuple[Transform, ...] = get_args(Transform)
PADDINGS = LEVELS

_POLICY_KEYS = ("version", "classes", "rule")
_RULE_KEYS = ("id", "when", "effect", "edge", "transform", "require")
_NAME_CONDITIONS = ("model", "task", "tenant", "purpose", "region", "network", "findings")
_REQUIRE_KEYS = ("padding", "attestation", "region")
_NAMES_FIX = 'Write one name, as in "assistant", or a list, as in ["assistant", "minilm"]'


def load_policy(path: str | Path) -> Policy:
    """Read and parse a policy file.

    Raises:
        ConfigError: The file cannot be read, or does not hold a policy.
    """
    path = Path(path).expanduser()
    return parse_policy(read_text(path), source=str(path))


def parse_policy(text: str, *, source: str = "policy") -> Policy:
    """Parse the text of a policy file.

    Args:
        text: TOML.
        source: File name for messages.

    Raises:
        ConfigError: The text is not a policy.
    """
    top = Table(parse_toml(text, source=source), where=source, known=_POLICY_KEYS)
    version = top.required("version", fix=f"Begin the file with version = {FORMAT_VERSION}")
    if version is True or version != FORMAT_VERSION:
        raise top.error(
            "version",
            "is a version of the format that this nearfar does not read",
            fix=f"Write version = {FORMAT_VERSION}",
        )
    classes = _classes(top)
    return Policy(
        version=FORMAT_VERSION,
        classes=classes,
        rules=_rules(top, classes, source),
        source=source,
    )


def _classes(top: Table) -> tuple[str, ...]:
    if not top.has("classes"):
        return DEFAULT_CLASSES
    fix = 'List them from the least to the most strict, as in ["public", "personal"]'
    value = top.raw("classes")
    if not isinstance(value, list) or not value:
        raise top.error("classes", "must be a list of at least one name", fix=fix)
    classes: list[str] = []
    for item in value:
        if not isinstance(item, str):
            raise top.error("classes", "must be a list of names", fix=fix)
        top.check_name("classes", item, max_length=MAX_CLASS_LENGTH)
        if item in classes:
            raise top.error("classes", f"lists '{item}' twice", fix="Give each class one place")
        classes.append(item)
    return tuple(classes)


def _rules(top: Table, classes: tuple[str, ...], source: str) -> tuple[Rule, ...]:
    value = top.raw("rule") if top.has("rule") else []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise top.error("rule", "must be a list of tables", fix="Begin each rule with [[rule]]")
    if len(value) > MAX_RULES:
        raise top.error(
            "rule",
            f"holds {len(value)} rules",
            fix=f"Use at most {MAX_RULES}; one rule may list several models or tenants",
        )
    rules: list[Rule] = []
    seen: set[str] = set()
    for number, values in enumerate(value, start=1):
        rule = _rule(values, number, classes, source)
        if rule.id in seen:
            raise ConfigError(
                f"{source}: rule {number} has the id '{rule.id}', which an earlier rule has",
                field="id",
                fix="Give each rule an id of its own; reasons and logs name it",
            )
        seen.add(rule.id)
        rules.append(rule)
    return tuple(rules)


def _rule(values: dict[str, object], number: int, classes: tuple[str, ...], source: str) -> Rule:
    rule_id = values.get("id")
    named = isinstance(rule_id, str) and 0 < len(rule_id) <= MAX_ID_LENGTH
    where = f"{source}: rule '{rule_id}'" if named else f"{source}: rule {number}"
    table = Table(values, where=where, known=_RULE_KEYS)
    id_fix = 'Give the rule a short name, as in id = "clinic-2"'
    table.required("id", fix=id_fix)
    checked_id = table.name("id", max_length=MAX_ID_LENGTH, fix=id_fix)
    assert checked_id is not None
    if checked_id == BUILT_IN_RULE_ID:
        raise table.error("id", "is reserved for the built-in policy", fix="Choose another id")
    # An absent `when` would match every request, and is more likely forgotten than meant.
    table.required("when", fix="Add when = { … }, or when = {} to match every request")
    effect = _effect(table)
    edge = table.boolean("edge", default=True)
    transforms = _transforms(table)
    require = _requirement(table.table("require", known=_REQUIRE_KEYS))
    if effect != "cloud_ok":
        for key in ("edge", "transform", "require"):
            if table.has(key):
                raise table.error(
                    key,
                    f'has no meaning with effect = "{effect}", which sends nothing to the cloud',
                    fix=f'Remove {key}, or write effect = "cloud_ok"',
                )
    return Rule(
        id=checked_id,
        effect=effect,
        when=_condition(table, classes),
        edge=edge,
        transforms=transforms,
        require=require,
    )


def _effect(table: Table) -> Effect:
    value = table.required("effect", fix=f"Use one of: {', '.join(EFFECTS)}")
    if value in TRANSFORMS:
        raise table.error(
            "effect",
            f"is '{value}', which is a transform",
            fix=f'Write effect = "cloud_ok" and transform = ["{value}"]',
        )
    if value == "require":
        raise table.error(
            "effect",
            "is 'require', which is a key of its own",
            fix='Write effect = "cloud_ok" and require = { padding = "balanced" }',
        )
    effect = table.choice("effect", EFFECTS)
    assert effect is not None
    return effect


def _transforms(table: Table) -> tuple[Transform, ...]:
    names = table.names(
        "transform",
        max_length=MAX_NAME_LENGTH,
        fix=f'Write a list, as in ["redact"]; known: {", ".join(TRANSFORMS)}',
    )
    for name in names or ():
        if name not in TRANSFORMS:
            raise table.error("transform", f"holds '{name}'", fix=suggestion(name, TRANSFORMS))
    return tuple(transform for transform in TRANSFORMS if transform in (names or ()))


def _requirement(table: Table) -> Requirement:
    return Requirement(
        padding=table.choice("padding", PADDINGS) or "off",
        attestation=table.boolean("attestation", default=False),
        region=table.names("region", max_length=MAX_REGION_LENGTH, fix=_NAMES_FIX),
    )


def _condition(rule: Table, classes: tuple[str, ...]) -> Condition:
    when = rule.table("when", known=(*_NAME_CONDITIONS, "sensitivity"))
    return Condition(
        sensitivity=_sensitivity(when, classes),
        **{
            key: when.names(
                key,
                max_length=MAX_REGION_LENGTH if key == "region" else MAX_NAME_LENGTH,
                fix=_NAMES_FIX,
            )
            for key in _NAME_CONDITIONS
        },
    )


def _sensitivity(when: Table, classes: tuple[str, ...]) -> tuple[str, ...] | None:
    """The classes a rule is for, least strict first; `None` for all."""
    if not when.has("sensitivity"):
        return None
    fix = 'Write a class, a list of classes, { at_least = "…" } or { at_most = "…" }'
    if not isinstance(when.raw("sensitivity"), dict):
        names = when.names("sensitivity", max_length=MAX_CLASS_LENGTH, fix=fix) or ()
        for name in names:
            _rank(when, "sensitivity", name, classes)
        return tuple(name for name in classes if name in names)
    bounds = when.table("sensitivity", known=("at_least", "at_most"))
    at_least = bounds.name("at_least", max_length=MAX_CLASS_LENGTH, fix=fix)
    at_most = bounds.name("at_most", max_length=MAX_CLASS_LENGTH, fix=fix)
    if at_least is None and at_most is None:
        raise when.error("sensitivity", "is an empty table", fix=fix)
    first = 0 if at_least is None else _rank(bounds, "at_least", at_least, classes)
    last = len(classes) - 1 if at_most is None else _rank(bounds, "at_most", at_most, classes)
    if first > last:
        raise when.error(
            "sensitivity",
            f"asks for at least '{at_least}' and at most '{at_most}', which no class is",
            fix="Exchange the two",
        )
    return classes[first : last + 1]


def _rank(table: Table, key: str, name: str, classes: tuple[str, ...]) -> int:
    if name not in classes:
        raise table.error(
            key, f"names '{name}', which is not among the classes", fix=suggestion(name, classes)
        )
    return classes.index(name)
