from __future__ import annotations

import json

import pytest

from nearfar.errors import BundleError, InvalidInput
from nearfar.generation import ChatMessage

pytest.importorskip("jinja2", reason="needs the package jinja2")

from nearfar.engines.chat_template import ChatTemplate

PLAIN = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
HELLO = [ChatMessage("user", "hello")]


def template(folder, *, jinja=None, config=None):
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return ChatTemplate(folder, label="tiny/int4")


def test_a_template_file_renders_with_the_tokens_of_the_configuration(tmp_path):
    made = template(tmp_path, jinja=PLAIN, config={"bos_token": {"content": "<s>"}})
    assert made.render(HELLO) == "<s><user>hello<assistant>"


def test_the_template_may_stand_in_the_configuration(tmp_path):
    made = template(tmp_path, config={"chat_template": PLAIN, "bos_token": "<s>"})
    assert made.render(HELLO) == "<s><user>hello<assistant>"


def test_of_several_named_templates_the_default_one_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": PLAIN}]
    assert template(tmp_path, config={"chat_template": named}).render(HELLO).startswith("<user>")


def test_content_is_not_escaped_and_not_executed(tmp_path):
    nasty = "<b>&amp;</b> {{ 7 * 7 }} é 🙂"
    assert nasty in template(tmp_path, jinja=PLAIN).render([ChatMessage("user", nasty)])


def test_helpers_that_templates_expect_are_there(tmp_path):
    jinja = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y') }}"
    )
    text = template(tmp_path, jinja=jinja).render([ChatMessage("system", "x"), *HELLO])
    assert text.startswith('{"role": "user", "content": "hello"}20')


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(tmp_path, jinja):
    with pytest.raises(InvalidInput, match="chat template of tiny/int4 refuses"):
        template(tmp_path, jinja=jinja).render(HELLO)


def test_a_template_may_refuse_a_conversation(tmp_path):
    jinja = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidInput, match="roles must alternate"):
        template(tmp_path, jinja=jinja).render(HELLO)


def test_an_unknown_role_is_named(tmp_path):
    with pytest.raises(InvalidInput, match="Message 1 has the role 'robot'"):
        template(tmp_path, jinja=PLAIN).render([*HELLO, ChatMessage("robot", "x")])


def test_a_model_without_template_takes_text_only(tmp_path):
    with pytest.raises(InvalidInput, match="no chat template"):
        template(tmp_path).render(HELLO)


@pytest.mark.parametrize(
    "files", [{"jinja": "{% for %}"}, {"config": "{not json"}], ids=["template", "configuration"]
)
def test_files_that_do_not_parse_are_bundle_errors(tmp_path, files):
    with pytest.raises(BundleError):
        template(tmp_path, **files)
