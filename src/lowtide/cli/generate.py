"""``lowtide generate``: a model answers a prompt, or chats, streamed to the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..training.choices import DTYPES
from .arguments import UsageError, positive_int

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_EPILOG = """\
examples:
  lowtide generate --model tuned/model --prompt 'Name three rivers.'
  lowtide generate --model tuned/model --chat --temperature 0.7
  echo 'Once upon a time' | lowtide generate --model tuned/model --raw"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "--model", required=True, help="a Hugging Face directory, a name on the Hugging Face hub, or a .gguf file"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="what to answer; default: read it from standard input")
    source.add_argument("--chat", action="store_true", help="talk, one line a turn; end with Ctrl-D")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, also where the model has a chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message for a model with a chat template")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=256,
        metavar="N",
        help="tokens to generate at most (default: 256)",
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="X",
        help="0 always takes the likeliest token; higher is more varied (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="for a temperature above 0 (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES[:3], default="bfloat16", help="number format (default: bfloat16)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that comes with the model"
    )


def run(args: argparse.Namespace) -> int:
    """Generate. Returns the exit code."""
    if args.chat and args.raw:
        raise UsageError("--chat needs the chat template, which --raw turns off: choose one")
    from .quiet import quiet_libraries

    quiet_libraries()
    import torch

    from ..models import load_model, load_tokenizer, parse_dtype
    from ..training import resolve_device

    device = resolve_device(args.device)
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    if (args.chat or args.system) and not tokenizer.chat_template:
        flag = "--chat" if args.chat else "--system"
        raise ValueError(f"{args.model} has no chat template, so {flag} cannot work; use --prompt")
    prompt = None if args.chat else _read_prompt(args.prompt)
    model = load_model(
        args.model, dtype=parse_dtype(args.dtype), device=device, trust_remote_code=args.trust_remote_code
    )
    model.eval()
    torch.manual_seed(args.seed)
    speaker = Speaker(model, tokenizer, max_new_tokens=args.max_new_tokens, temperature=args.temperature)
    if prompt is None:
        _chat(speaker, args.system)
    elif args.raw or not tokenizer.chat_template:
        speaker.say(tokenizer(prompt, return_tensors="pt")["input_ids"])
    else:
        speaker.answer([*_system_message(args.system), {"role": "user", "content": prompt}])
    return 0


class Speaker:
    """Generates with a model and prints the text while it comes.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        max_new_tokens: tokens to generate at most.
        temperature: of sampling; 0 takes the likeliest token.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, temperature: float
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    @property
    def max_prompt_tokens(self) -> int:
        """What the model's context has room for beside the answer; at least 1."""
        from ..models.context import context_length

        limit = context_length(self.model.config)
        return sys.maxsize if limit is None else max(1, limit - self.max_new_tokens)

    def encode(self, messages: list[dict[str, str]]) -> Any:
        """The messages as the chat template writes them, ready for an answer: int64 [1, S].

        Raises:
            ValueError: the template refuses them.
        """
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise jinja2's errors, transformers its own
            roles = ", ".join(message["role"] for message in messages)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            hint = "; leave out --system" if messages[0]["role"] == "system" else ""
            raise ValueError(f"the model's chat template refuses these messages ({roles}): {reason}{hint}") from error
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def answer(self, messages: list[dict[str, str]]) -> str:
        """Answer the last of the messages; returns what was printed."""
        return self.say(self.encode(messages))

    def say(self, input_ids: Any) -> str:
        """Continue ``input_ids``, int64 [1, S]; returns what was printed.

        Raises:
            ValueError: the prompt is empty, or too long for the model's context.
        """
        import torch
        from transformers import TextStreamer

        num_tokens = input_ids.shape[1]
        if num_tokens == 0:
            raise ValueError("the prompt is empty")
        if num_tokens > self.max_prompt_tokens:
            raise ValueError(
                f"the prompt has {num_tokens} tokens; with --max-new-tokens {self.max_new_tokens} the model's context "
                f"has room for {self.max_prompt_tokens}"
            )
        input_ids = input_ids.to(self.model.device)
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else _GREEDY
        with torch.inference_mode():
            output = self.model.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self._pad_token_id(),
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **sampling,
            )
        return str(self.tokenizer.decode(output[0, num_tokens:], skip_special_tokens=True))

    def _pad_token_id(self) -> int | None:
        """Nothing is padded here, but transformers warns when it is not told."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else end


# A generation config of the model may ask for sampling; these undo all of it.
_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _chat(speaker: Speaker, system: str | None) -> None:
    """One line in, one answer out, until the input ends. The oldest turns go when the context is full."""
    messages = _system_message(system)
    first = len(messages)
    for line in _lines():
        messages.append({"role": "user", "content": line})
        while len(messages) > first + 1 and speaker.encode(messages).shape[1] > speaker.max_prompt_tokens:
            del messages[first : first + 2]
        try:
            messages.append({"role": "assistant", "content": speaker.answer(messages)})
        except ValueError as error:
            # the conversation goes on without this line
            print(f"lowtide: {error}", file=sys.stderr)
            messages.pop()


def _lines() -> Iterator[str]:
    """The lines that are not blank of standard input; asks for each where a person types them."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("you> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return
        if line.strip():
            yield line.strip()


def _read_prompt(prompt: str | None) -> str:
    if prompt is None:
        if sys.stdin.isatty():
            print("Type the prompt, then Ctrl-D:", file=sys.stderr)
        prompt = sys.stdin.read().rstrip("\n")
    if not prompt.strip():
        raise UsageError("the prompt is empty; give --prompt TEXT, or text on standard input")
    return prompt


def _system_message(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value
