"""Conversations as text: render with the tokenizer's chat template and say which characters are trained on.

The assistant turns are found without ``{% generation %}`` marks, which few templates have. What the model is given
before turn i is the conversation up to it with the generation prompt; what it should have written is whatever the
template adds when the turn itself is rendered: the content and the end-of-turn token, but not the role header. (If a
template has no generation prompt, the header is for the model to write, and then it is trained on, as inference will
need it.)
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from .record import Record, RenderedChat

__all__ = ["RenderedChat", "date_of", "fix_date", "make_renderer", "render_chats"]

_DATE = "lowtide_date"  # on a tokenizer: what its template takes for today
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def fix_date(tokenizer: PreTrainedTokenizerBase, date: str) -> None:
    """Have the chat template write this day, as 2026-11-28, for today: a run that is resumed tomorrow has the data of today."""
    setattr(tokenizer, _DATE, datetime.date.fromisoformat(date))


def date_of(tokenizer: PreTrainedTokenizerBase) -> datetime.date:
    """What the chat template writes for today."""
    found: datetime.date | None = getattr(tokenizer, _DATE, None)
    return found or datetime.date.today()


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template may write it at all."""
    return "strftime_now" in str(tokenizer.chat_template)


def make_renderer(tokenizer: PreTrainedTokenizerBase) -> Callable[[Record], Record]:
    """What renders a record's ``messages`` while it is read, so that one that the template refuses is a bad record among others.

    Other records stay as they are, and so do all if there is no chat template, which :func:`render_chats` refuses.

    Raises (when it is called):
        ValueError: the template refuses the conversation, or a rendered assistant turn does not start with the generation prompt.
    """
    if tokenizer.chat_template is None:
        return lambda record: record
    end_tokens = _end_tokens(tokenizer)

    def render(record: Record) -> Record:
        if record.messages is None:
            return record
        return dataclasses.replace(record, rendered=_render_record(record, tokenizer, end_tokens))

    return render


def render_chats(records: list[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[RenderedChat]]:
    """Render the ``messages`` of every record.

    Normally one rendering a record. A template that rewrites earlier assistant turns once the conversation goes on
    (Qwen3 drops their reasoning) gives one a turn, each what inference would see at that turn and trained on that turn
    alone.

    Raises:
        ValueError: there is no chat template, the template refuses the conversation, or a rendered assistant turn does
            not start with the generation prompt.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{records[0].where}: 'messages' need a chat template and this tokenizer has none; "
            "use an instruct model, give a template with --chat-template FILE, or write the data as prompt/completion"
        )
    end_tokens = _end_tokens(tokenizer)
    return [record.rendered or _render_record(record, tokenizer, end_tokens) for record in records]


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens that a turn may end with."""
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return tuple(token for token in tokens if token.strip())


def _render_record(
    record: Record, tokenizer: PreTrainedTokenizerBase, end_tokens: tuple[str, ...]
) -> list[RenderedChat]:
    assert record.messages is not None
    chats = []
    for index, message in enumerate(record.messages):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        before = _render(record, index, tokenizer, generation_prompt=True)
        after = _render(record, index + 1, tokenizer, generation_prompt=False)
        if not after.startswith(before):
            raise ValueError(
                f"{record.where}: the chat template cannot be trained on: with messages[{index}] rendered, the text "
                f"does not start with what inference is given (the generation prompt ends in {before[-30:]!r}); "
                "give another template with --chat-template FILE, or write the data as prompt/completion"
            )
        chats.append(RenderedChat(after, [(len(before), _end_of_turn(after, end_tokens))]))
    # Whatever follows the last turn that is trained on teaches nothing, so the last rendering is the whole of the conversation.
    whole = chats[-1].text
    if all(whole.startswith(chat.text) for chat in chats):
        return [RenderedChat(whole, [chat.spans[0] for chat in chats])]
    return chats


def _render(record: Record, num_messages: int, tokenizer: PreTrainedTokenizerBase, *, generation_prompt: bool) -> str:
    assert record.messages is not None
    turns = [{key: turn[key] for key in turn if key != "weight"} for turn in record.messages[:num_messages]]
    try:
        template = _dated(tokenizer.get_chat_template(), date_of(tokenizer)) if writes_date(tokenizer) else None
        text = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:  # templates raise jinja2's errors, transformers its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{record.where}: the chat template refuses messages[:{num_messages}] ({reason}); correct this record, or give another "
            "template with --chat-template FILE"
        ) from error
    assert isinstance(text, str)
    return text


def _dated(template: str, date: datetime.date) -> str:
    """The template with the date written out. transformers hands no function on to a template, so its own cannot be replaced."""
    midnight = datetime.datetime.combine(date, datetime.time())
    return _NOW.sub(lambda found: f"{found[1]}{midnight.strftime(found[2])}{found[1]}", template)


def _end_of_turn(text: str, end_tokens: tuple[str, ...]) -> int:
    """Where the trained part of a turn that ends ``text`` ends.

    ChatML writes a newline after ``<|im_end|>``. Generation stops at the token, so the newline is not for the model to
    write. Where white space is all that ends a turn, it is the end-of-turn mark and stays.
    """
    stripped = text.rstrip()
    return len(stripped) if stripped.endswith(end_tokens) else len(text)
