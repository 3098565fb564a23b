"""The tokenizer of a run, and the chat template that it is given."""

import signal

import pytest
from transformers import AutoTokenizer

from lowtide.training import TrainConfig, train
from lowtide.training.tokenizer import tokenizer_of
from tiny_files import write_jsonl

OWN = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}a:{% endif %}\n"


@pytest.fixture
def config(make_config, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(OWN)
    rows = [
        {"messages": [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes" * n}]}
        for n in range(1, 9)
    ]
    data = write_jsonl(tmp_path / "chats.jsonl", rows)
    return make_config(data=[str(data)], chat_template=str(template), batch_size=2)


def run(config, stop_after=None, **changes):
    def interrupt(event):
        if event["event"] == "train" and event["step"] == stop_after:
            signal.raise_signal(signal.SIGINT)

    return train(TrainConfig(**{**config.to_dict(), **changes}), on_event=interrupt, show_progress=False)


def test_without_a_file_it_is_the_models(make_config):
    config = make_config()
    assert tokenizer_of(config).chat_template == AutoTokenizer.from_pretrained(config.model).chat_template


def test_the_trained_model_has_the_template(config):
    assert tokenizer_of(config).chat_template == OWN
    result = run(config, max_steps=1)
    assert AutoTokenizer.from_pretrained(result.model_dir).chat_template == OWN


def test_a_run_is_resumed_with_the_template_it_was_begun_with(config, tmp_path):
    assert run(config, stop_after=2).interrupted
    with pytest.raises(ValueError, match=r"chat_template was '.*own\.jinja' and is None; set them back"):
        run(config, resume="latest", chat_template=None)
    (tmp_path / "own.jinja").write_text(f"chat:{OWN}")
    with pytest.raises(ValueError) as caught:
        run(config, resume="latest")
    assert str(caught.value) == (
        f"chat_template {config.chat_template} is not what {tmp_path}/out/checkpoints/step-00000002 was written with, so the run "
        "would not be the same; restore the file, or allow the change with --allow-changes"
    )
    (tmp_path / "own.jinja").write_text(OWN)
    result = run(config, resume="latest")
    assert result.num_steps == config.max_steps
    assert AutoTokenizer.from_pretrained(result.model_dir).chat_template == OWN


def test_a_changed_template_can_be_allowed(config, tmp_path):
    run(config, stop_after=2)
    changed = f"chat:{OWN}"
    (tmp_path / "own.jinja").write_text(changed)
    result = run(config, resume="latest", allow_changes=True)
    assert AutoTokenizer.from_pretrained(result.model_dir).chat_template == changed


def test_a_wrong_file_is_named_before_the_model_is_loaded(make_config, monkeypatch):
    monkeypatch.setattr("lowtide.training.run.load_model", None)
    with pytest.raises(FileNotFoundError, match=r"^chat template nowhere\.jinja: no such file"):
        run(make_config(chat_template="nowhere.jinja"))
    with pytest.raises(ValueError, match="^chat_template must name a file, or be left out"):
        run(make_config(chat_template=""))
