"""The tokenizer in a GGUF file.

A GGUF file holds the vocabulary and the merges, but of the pre-tokenizer (how text is cut before merges apply) only a
name, ``tokenizer.ggml.pre``. transformers ignores that name in older versions and knows some of them, not SmolLM's, in
newer ones. For byte-level vocabularies the tokenizer is therefore built here, from the facts below; transformers builds
others (SentencePiece).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..log import get_logger
from .gguf_header import GgufHeader

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_logger = get_logger(__name__)

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTROL, _USER_DEFINED = 3, 4


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How a family of models cuts text before merges apply.

    Attributes:
        split: regular expression of the pieces; None for GPT-2's, which the tokenizers library has built in.
        single_digits: every digit is a piece.
        nfc: Unicode normalisation form C is applied first.
        ignore_merges: a piece that is a token as a whole is that token, whatever the merges say.
        add_bos: text begins with the bos token where the file does not say.
    """

    split: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = PreTokenizer(split=_LETTERS + r"|\p{N}{1,3}" + _REST, ignore_merges=True, add_bos=True)

# By tokenizer.ggml.pre; each as in the tokenizer.json that these families publish.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "phi-2": PreTokenizer(),
    "smollm": PreTokenizer(single_digits=True),
    "starcoder": PreTokenizer(single_digits=True),
    "refact": PreTokenizer(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": PreTokenizer(split=_LETTERS + r"|\p{N}" + _REST, nfc=True),
}


def load_gguf_tokenizer(header: GgufHeader) -> PreTrainedTokenizerBase:
    """The tokenizer of the model in a GGUF file, with its special tokens and chat template.

    Raises:
        ValueError: the file holds no tokenizer, or one that cannot be read.
    """
    kind, pre = header.metadata.get("tokenizer.ggml.model"), header.metadata.get("tokenizer.ggml.pre")
    if kind is None or "tokenizer.ggml.tokens" not in header.metadata:
        raise ValueError(f"{header.path} holds no tokenizer; give the model as a Hugging Face directory")
    if kind == "gpt2" and pre in PRE_TOKENIZERS:
        return _build(header, PRE_TOKENIZERS[pre])
    if kind == "gpt2":
        _logger.warning(
            "%s: how this model cuts text into pieces (tokenizer.ggml.pre = %r) is not known to lowtide, so "
            "tokenisation may be off; give the model as a Hugging Face directory with its own tokenizer to be sure",
            header.path.name,
            pre,
        )
    return _through_transformers(header)


def _through_transformers(header: GgufHeader) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(header.path.parent), gguf_file=header.path.name)
    except Exception as error:  # a dozen converters, each of which fails in ways of its own
        raise ValueError(
            f"{header.path}: transformers cannot read this tokenizer ({type(error).__name__}: {error}); give the model "
            "as a Hugging Face directory"
        ) from error
    # transformers looks for other files beside this one, and would save where it found it.
    tokenizer.name_or_path = ""
    return tokenizer


def _build(header: GgufHeader, pre: PreTokenizer) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    metadata = header.metadata
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    special: dict[str, Any] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        special[f"{role}_token"] = tokens[token_id] if token_id is not None and token_id < len(tokens) else None
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", pre.add_bos)) and special["bos_token"] is not None
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and special["eos_token"] is not None
    backend = _backend(metadata, tokens, pre)
    _add_ends(backend, tokens, special["bos_token"] if add_bos else None, special["eos_token"] if add_eos else None)
    length = metadata.get(f"{header.architecture}.context_length")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **special,
        **({"model_max_length": length} if length else {}),
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _backend(metadata: dict[str, Any], tokens: list[str], pre: PreTokenizer) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [(first, second) for first, _, second in (m.partition(" ") for m in metadata["tokenizer.ggml.merges"])]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.single_digits else []
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        whole = [token for token, kind in zip(tokens, kinds, strict=False) if kind == wanted]
        added = [AddedToken(token, normalized=False, special=special) for token in whole]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    return backend


def _add_ends(backend: Tokenizer, tokens: list[str], bos: str | None, eos: str | None) -> None:
    """Let the tokenizer put ``bos`` before and ``eos`` after a text; None for neither."""
    from tokenizers import processors

    if bos is None and eos is None:
        # Offsets as byte-level tokenizers give them: without the space that a token begins with.
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        return
    single = [part for part in (bos, "$A", eos) if part is not None]
    pair = [*single, *(part if part != "$A" else "$B:1" for part in single)]
    ends = [(token, tokens.index(token)) for token in dict.fromkeys((bos, eos)) if token is not None]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
