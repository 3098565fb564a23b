"""A chat template of the user's own: a file in Jinja that takes the place of the tokenizer's."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase


def set_chat_template(tokenizer: PreTrainedTokenizerBase, file: str | Path) -> None:
    """Give a tokenizer the chat template in a file; it is saved with the tokenizer from then on.

    Args:
        tokenizer: is changed.
        file: a template in Jinja, as in the ``chat_template.jinja`` of a model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, or no template.
    """
    from jinja2 import TemplateSyntaxError

    path = Path(file).expanduser()
    tokenizer.chat_template = _read(path)
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: not a chat template in Jinja ({error.message}); correct it") from None
    except Exception:  # templates raise jinja2's errors, transformers its own
        pass  # That it refuses this conversation means nothing: of those in the data each is named where it is.


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"chat template {path}: no such file; name a file with a template in Jinja")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"chat template {path}: byte {error.start} is not valid UTF-8; save the file as UTF-8"
        ) from None
    if _is_json(text):
        raise ValueError(
            f"chat template {path}: this is JSON; save the template in it, the text under 'chat_template', as a file of its own"
        )
    if "{{" not in text and "{%" not in text:
        raise ValueError(f"chat template {path}: there is no Jinja in it ({{{{ ... }}}} or {{% ... %}})")
    return text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
