"""``lowtide completion``: a script with which bash, zsh or fish completes commands, flags and their values.

The script is made from the parsers and holds everything, so a press of the Tab key starts no Python. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable

from ..training.choices import TRACKERS

SHELLS = ("bash", "zsh", "fish")
_TASKS = ("boolq", "cb", "copa", "multirc", "rte", "wic", "wsc")
# Flags whose help does not say what there is to choose from, and those whose value may also be a path.
_WORDS = {
    "device": ("auto", "cpu", "cuda"),
    "task": tuple(f"superglue/{name}" for name in _TASKS),
    "track": TRACKERS,
}
_PATHS = ("model", "data")

_EPILOG = """\
examples:
  source <(lowtide completion bash)                          # in this shell; in ~/.bashrc: in all
  lowtide completion zsh > ~/.zfunc/_lowtide                 # ~/.zfunc being in $fpath before compinit
  lowtide completion fish > ~/.config/fish/completions/lowtide.fish"""


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag, or what a command takes without one.

    Attributes:
        flags: its names; empty for what has none.
        text: one line of help.
        words: values it may have.
        paths: "files", "directories" or nothing: what else completes its value.
        takes: "nothing", "one" or "many" values.
    """

    flags: tuple[str, ...]
    text: str
    words: tuple[str, ...]
    paths: str
    takes: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.epilog = _EPILOG
    parser.add_argument("shell", choices=SHELLS, help="which shell")


def run(args: argparse.Namespace) -> int:
    """Print the script. Returns the exit code."""
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](all_options()), end="")
    return 0


def all_options() -> dict[str, list[Option]]:
    """Of every command."""
    from . import COMMANDS, build_parser

    return {name: [_option(action) for action in build_parser(name)[1][name]._actions] for name in COMMANDS}


def _option(action: argparse.Action) -> Option:
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    parts = re.split(r"[|,]", metavar.strip("{}"))
    words = tuple(map(str, action.choices)) if action.choices else tuple(part for part in parts if part.islower())
    paths = ""
    if "FILE" in parts or action.dest in _PATHS:
        paths = "files"
    elif any(part.endswith("DIR") for part in parts):
        paths = "directories"
    takes = "nothing" if action.nargs == 0 else "many" if action.nargs == "+" else "one"
    text = re.split(r"[;:.(]", " ".join((action.help or "").split()))[0].strip().replace("%%", "%")
    known = words if action.choices or "/" not in metavar else ()
    return Option(tuple(action.option_strings), text, _WORDS.get(action.dest, known), paths, takes)


# bash ----------------------------------------------------------------------------------------------------------------


def bash(commands: dict[str, list[Option]]) -> str:
    """For bash 4 and later."""
    values, many, flags = [], [], []
    for name, options in commands.items():
        flags.append(f'        {name}) flags="{" ".join(_flags(options))}" ;;')
        for option in options:
            where = "|".join(f"{name},{flag}" for flag in option.flags or ("",))
            if option.takes == "many":
                many.append(where)
            if option.takes != "nothing":
                values.append(f'        {where}) words="{" ".join(option.words)}" paths="{option.paths}" ;;')
    newline = "\n"
    return f"""\
# Completion of lowtide for bash, written by `lowtide completion bash`.
_lowtide() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD - 1]}} command="" flag="" flags="" words="" paths="" i
    COMPREPLY=()
    # Bash cuts --flag=value into three words.
    if [[ $cur == "=" ]]; then cur=""; elif [[ $prev == "=" ]]; then prev=${{COMP_WORDS[COMP_CWORD - 2]}}; fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "${{COMP_WORDS[i]}}" in
            {"|".join(commands)}) command=${{COMP_WORDS[i]}}; break ;;
        esac
    done
    if [[ -z $command ]]; then
        COMPREPLY=($(compgen -W "{" ".join(commands)} --help --version" -- "$cur"))
        return
    fi
    # The flag that a value belongs to: the word before, or further back one that takes several.
    if [[ $prev == -* ]]; then
        flag=$prev
    else
        for ((i = COMP_CWORD - 1; i > 1; i--)); do
            if [[ ${{COMP_WORDS[i]}} == -* ]]; then flag=${{COMP_WORDS[i]}}; break; fi
        done
        case "$command,$flag" in
            {"|".join(many)}) ;;
            *) flag="" ;;
        esac
    fi
    case "$command" in
{newline.join(flags)}
    esac
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$cur"))
        return
    fi
    case "$command,$flag" in
{newline.join(values)}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    if [[ -n $paths ]]; then
        compopt -o filenames 2>/dev/null
        local IFS=$'\\n'
        if [[ $paths == files ]]; then COMPREPLY+=($(compgen -f -- "$cur")); else COMPREPLY+=($(compgen -d -- "$cur")); fi
    elif [[ -z $words && -z $flag ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$cur"))
    fi
}}
complete -F _lowtide lowtide
"""


# zsh -----------------------------------------------------------------------------------------------------------------


def zsh(commands: dict[str, list[Option]]) -> str:
    """For compinit: a file named _lowtide."""
    summaries = "\n".join(f"        {_quoted(f'{name}:{_summary(name)}')}" for name in commands)
    cases = []
    for name, options in commands.items():
        specs = " \\\n                ".join(
            _zsh_spec(option, flag) for option in options for flag in option.flags or ("",)
        )
        cases.append(
            f"            {name})\n                _arguments -S \\\n                {specs}\n                ;;"
        )
    joined = "\n".join(cases)
    return f"""\
#compdef lowtide
# Completion of lowtide for zsh, written by `lowtide completion zsh`.
_lowtide_files() {{ (($#)) && compadd -- "$@"; _files }}
_lowtide_directories() {{ (($#)) && compadd -- "$@"; _files -/ }}
_lowtide() {{
    local curcontext="$curcontext" state line
    local -a commands
    commands=(
{summaries}
    )
    _arguments -C '(- *)--help[show the help]' '(- *)--version[show the version]' '1: :->command' '*:: :->arguments'
    case $state in
        command) _describe -t commands command commands ;;
        arguments)
            case $words[1] in
{joined}
            esac
            ;;
    esac
}}
if [[ $funcstack[1] == _lowtide ]]; then _lowtide "$@"; else compdef _lowtide lowtide; fi
"""


def _zsh_spec(option: Option, flag: str) -> str:
    help_text = re.sub(r"([\[\]:\\])", r"\\\1", option.text)
    if option.takes == "nothing":
        return _quoted(f"{flag}[{help_text}]")
    if option.paths:  # a space before a function has it called as it is written
        action = " ".join([f" _lowtide_{option.paths}", *option.words])
    else:
        action = f"({' '.join(option.words)})" if option.words else " "
    if not flag:
        return _quoted(f":{help_text}:{action}")
    return _quoted(f"{flag}=[{help_text}]:{'*-*:' if option.takes == 'many' else ''}value:{action}")


# fish ----------------------------------------------------------------------------------------------------------------


def fish(commands: dict[str, list[Option]]) -> str:
    """For a file lowtide.fish."""
    names = " ".join(commands)
    lines = [
        "# Completion of lowtide for fish, written by `lowtide completion fish`.",
        "complete -c lowtide -f",
        f"complete -c lowtide -n 'not __fish_seen_subcommand_from {names}' -l help -d 'show the help'",
        f"complete -c lowtide -n 'not __fish_seen_subcommand_from {names}' -l version -d 'show the version'",
    ]
    for name, options in commands.items():
        lines.append(
            f"complete -c lowtide -n 'not __fish_seen_subcommand_from {names}' -a {name} -d {_quoted(_summary(name))}"
        )
        lines += [_fish_line(name, option) for option in options]
    return "\n".join(lines) + "\n"


def _fish_line(command: str, option: Option) -> str:
    long = " ".join(f"-l {flag[2:]}" for flag in option.flags if flag.startswith("--"))
    words = " ".join(option.words)
    if option.paths == "directories":
        words += " (__fish_complete_directories)"
    parts = [f"complete -c lowtide -n '__fish_seen_subcommand_from {command}'", long]
    if option.takes != "nothing" and option.flags:
        parts.append("-r" if option.paths == "files" else "-x")
    if option.paths == "files":
        parts.append("-F")
    if words.strip() and option.takes != "nothing":
        parts.append(f"-a {_quoted(words.strip())}")
    parts.append(f"-d {_quoted(option.text)}")
    return " ".join(part for part in parts if part)


def _flags(options: Iterable[Option]) -> list[str]:
    return [flag for option in options for flag in option.flags if flag.startswith("--")]


def _summary(name: str) -> str:
    from . import COMMANDS

    return COMMANDS[name][0]


def _quoted(text: str) -> str:
    """In single quotes, for all three shells."""
    return "'" + text.replace("'", "\u2019") + "'"
