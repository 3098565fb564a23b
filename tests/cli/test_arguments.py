import dataclasses
from collections.abc import Sequence

import pytest

from lowtide.cli.arguments import Parser, UsageError, add_dataclass_arguments, build_from_arguments, nearest


@dataclasses.dataclass
class Settings:
    name: str = dataclasses.field(metadata={"help": "who; default: nobody", "group": "first"})
    max_items: int = dataclasses.field(default=3, metadata={"help": "how many: 100 %", "group": "second"})
    lr: float | None = dataclasses.field(default=None, metadata={"help": "rate", "choices": ("1", "2")})
    files: Sequence[str] | None = None
    fast: bool = False
    safe: bool | None = None


def build(*flags):
    parser = Parser(prog="x")
    add_dataclass_arguments(parser, Settings)
    return build_from_arguments(Settings, parser.parse_args(flags))


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_flags_of_every_type():
    settings = build("--name", "n", "--max-items", "7", "--lr", "1e-3", "--files", "a", "b", "--fast", "--no-safe")
    assert settings == Settings("n", 7, 1e-3, ["a", "b"], True, False)
    assert build("--name", "n") == Settings("n")
    assert build("--name", "n", "--lr", "none").lr is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "name: n\nmax_items: 7\nlr: 1e-3\nfiles: [a, b]\nfast: true\nsafe: no\n"),
        ("run.yml", "name: n\nmax-items: 7\nlr: 0.001\nfiles:\n- a\n- b\nfast: yes\nsafe: false\n"),
        ("run.json", '{"name": "n", "max-items": 7, "lr": 1e-3, "files": ["a", "b"], "fast": true, "safe": false}'),
    ],
)
def test_a_file_says_the_same_as_flags(write, name, text):
    assert build("--config", str(write(text, name))) == Settings("n", 7, 1e-3, ["a", "b"], True, False)


def test_flags_win_over_the_file_and_the_file_over_defaults(write):
    path = write("name: file\nmax_items: 5\nfast: true\nfiles: one\nlr: null\n")
    assert build("--config", str(path), "--name", "flag", "--no-fast") == Settings("flag", 5, None, ["one"], False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: n\nmax_itens: 3\n", "run.yaml:2: unknown key 'max_itens' (did you mean max_items?)"),
        ("name: n\nzzz: 3\n", "run.yaml:2: unknown key 'zzz'"),
        ("name: n\nlearning_rate: 3\n", "run.yaml:2: unknown key 'learning_rate' (did you mean lr?)"),
        ("name: n\nmax_items: many\n", "run.yaml:2: max_items: expected a whole number, got 'many'"),
        ("name: n\nmax_items: 2.5\n", "run.yaml:2: max_items: expected a whole number, got 2.5"),
        ("name: n\nmax-items: true\n", "run.yaml:2: max-items: expected a whole number, got True"),
        ("name: n\nmax_items:\n", "run.yaml:2: max_items: expected a whole number, got None"),
        ("name: 2024\n", "run.yaml:1: name: expected text, got 2024"),
        ("name: n\nlr: [1]\n", "run.yaml:2: lr: expected a number, got [1]"),
        ("name: n\nfast: 'yes'\n", "run.yaml:2: fast: expected true or false, got 'yes'"),
        ("name: n\nfiles: [a, 1]\n", "run.yaml:2: files: expected text, got 1"),
        ("name: n\nfiles: {a: b}\n", "run.yaml:2: files: expected text, got {'a': 'b'}"),
        ("name: a\nname: b\n", "run.yaml:2: name is there a second time (first: {}/run.yaml:1)"),
        ("name: a\nmax_items: 1\nmax-items: 2\n", "run.yaml:3: max-items is there a second time"),
        ("- name\n", "run.yaml: expected settings, one `name: value` a line"),
        ("name: [a\nfast: b", "run.yaml:2: not valid YAML: "),
        ("max_items: 1\n", "name is missing: give --name, or name in a file for --config"),
        ("", "name is missing"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(write, text, message):
    path = write(text)
    with pytest.raises(ValueError) as error:
        build("--config", str(path))
    assert message.replace("{}", str(path.parent)) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "n", "max_itens": 3}', "run.json: unknown key 'max_itens' (did you mean max_items?)"),
        ('{"name": "n", "fast": 1}', "run.json: fast: expected true or false, got 1"),
        ('{"name": "n", "name": "m"}', "run.json: name is there a second time"),
        ('{"name": "n",\n "max_items": }', "run.json:2: not valid JSON: Expecting value"),
        ("[1]", "run.json: expected an object of settings"),
    ],
)
def test_what_is_wrong_in_a_json_file_is_named(write, text, message):
    path = write(text, "run.json")
    with pytest.raises(ValueError) as error:
        build("--config", str(path))
    assert message in str(error.value)


def test_a_config_file_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config file .*nope\.yaml does not exist"):
        build("--config", str(tmp_path / "nope.yaml"))
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ValueError, match=r"bad\.yaml: not UTF-8 text"):
        build("--config", str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-items", "many"), "argument --max-items: expected a whole number, got 'many'"),
        (("--max-items", "2.5"), "argument --max-items: expected a whole number, got '2.5'"),
        (("--max-items", "none"), "argument --max-items: expected a whole number, got 'none'"),
        (("--lr", "fast"), "argument --lr: expected a number, got 'fast'"),
        (("--name",), "argument --name: expected one argument"),
    ],
)
def test_wrong_flags_raise_instead_of_leaving(flags, message):
    with pytest.raises(UsageError) as error:
        build(*flags)
    assert str(error.value) == message


def test_help_has_groups_defaults_and_choices():
    parser = Parser(prog="x")
    add_dataclass_arguments(parser, Settings, ("second", "first"))
    text = parser.format_help()
    assert text.index("second:") < text.index("first:")
    assert "who (default: nobody)" in text
    assert "how many: 100 % (default: 3)" in text
    assert "--files" not in text  # its group was not asked for
    parser = Parser(prog="x")
    add_dataclass_arguments(parser, Settings)
    assert "--lr {1,2}" in parser.format_help()


def test_the_nearest_is_found_for_flags_and_names():
    assert nearest("--max-item", ["--max-items", "--name"]) == " (did you mean --max-items?)"
    assert nearest("--learning-rate", ["--lr"]) == " (did you mean --lr?)"
    assert nearest("zzz", ["lr"]) == ""


def test_none_is_a_word_where_a_setting_has_it(tmp_path):
    from lowtide.training.config import TrainConfig

    parser = Parser(prog="lowtide")
    add_dataclass_arguments(parser, TrainConfig)
    words = ["--model", "m", "--data", "d", "--output", "o"]
    config = build_from_arguments(TrainConfig, parser.parse_args([*words, "--data-cache", "none", "--task", "none"]))
    assert config.data_cache == "none" and config.task is None
    (tmp_path / "c.yaml").write_text("data_cache: none\n")
    config = build_from_arguments(TrainConfig, parser.parse_args([*words, "--config", str(tmp_path / "c.yaml")]))
    assert config.data_cache == "none"
    assert build_from_arguments(TrainConfig, parser.parse_args(words)).data_cache is None
