"""A chat template of the user's own."""

import pytest
from transformers import AutoTokenizer

from lowtide.data import Record, encode_records
from lowtide.data.chat_template import set_chat_template

CHAT = [{"role": "user", "content": "Is it low?"}, {"role": "assistant", "content": "yes"}]
OWN = (
    "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}"
    "{{ message.role }}: {{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}\n"
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(OWN)
    return path


def test_it_takes_the_place_of_the_tokenizers(tokenizer, make_tokenizer, file, tmp_path):
    for changed in (tokenizer, make_tokenizer(None)):
        set_chat_template(changed, file)
        (example,), _ = encode_records([Record("f", 1, messages=CHAT)], changed, 512)
        assert changed.decode(example.input_ids) == "user: Is it low?<|im_end|>\nassistant: yes<|im_end|>\n"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == OWN


def test_a_byte_order_mark_is_no_part_of_it(tokenizer, file):
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    set_chat_template(tokenizer, str(file))
    assert tokenizer.chat_template == OWN


def test_one_that_refuses_a_question_alone_may_accept_the_data(tokenizer, file):
    file.write_text("{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + OWN)
    set_chat_template(tokenizer, file)
    records = [Record("f", 1, messages=[{"role": "system", "content": "x"}, *CHAT])]
    assert len(encode_records(records, tokenizer, 512)[0]) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{% for message in messages %}\n{% endfor", "{path}:2: not a chat template in Jinja ("),
        (b"a\n\n{{ messages | }}", "{path}:3: not a chat template in Jinja ("),
        (b"user: assistant:", "chat template {path}: there is no Jinja in it ({{{{ ... }}}} or {{% ... %}})"),
        (b"", "chat template {path}: there is no Jinja in it"),
        (b'{"chat_template": "{{ messages }}"}', "chat template {path}: this is JSON; save the template in it"),
        (b"{{ '\xff' }}", "chat template {path}: byte 4 is not valid UTF-8; save the file as UTF-8"),
        (None, "chat template {path}: no such file; name a file with a template in Jinja"),
    ],
)
def test_files_that_are_no_template(tokenizer, file, content, says):
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        set_chat_template(tokenizer, file)
    assert str(caught.value).startswith(says.format(path=file))
    assert "\n" not in str(caught.value)
