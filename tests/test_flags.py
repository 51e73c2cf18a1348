"""Flags and YAML keys from dataclasses: precedence, types, errors, and the way back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest

from openrlhf_sgpo import flags


@dataclass
class Deep:
    rate: float = 0.5


@dataclass
class Adam:
    lr: float = field(default=5e-7, metadata={"help": "peak learning rate"})
    betas: tuple[float, float] = (0.9, 0.999)
    deep: Deep = field(default_factory=lambda: Deep(rate=0.25))


@dataclass
class Train:
    batch_size: int = 32
    packing: bool = False
    prompts: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=lambda: ["all"])
    stage: Literal[0, 1, 2] = 2
    kind: Literal["new", "all"] = "new"
    limit: int | None = None
    old_limit: Optional[float] = 1.0  # noqa: UP045 - the older spelling must work as well


@dataclass
class Root:
    algo: str = "one"
    key: str = field(default="", metadata={"secret": True, "help": "a key"})
    adam: Adam = field(default_factory=Adam)
    train: Train = field(default_factory=Train)


@dataclass(frozen=True)
class Options:
    alpha: float = 1.0


SECTIONS = {"": Root, "one": Options}


@pytest.fixture
def settings_file(tmp_path: Path):
    """Writes a settings file and returns the arguments that name it."""

    def write(text: str) -> list[str]:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write


def read(*argv: str) -> Root:
    return flags.parse(argv, SECTIONS).instances[""]


def problems(*argv: str, **arguments) -> list[str]:
    with pytest.raises(flags.SettingsError) as caught:
        flags.parse(argv, SECTIONS, **arguments)
    assert str(caught.value).splitlines() == list(caught.value.args)
    return str(caught.value).splitlines()


def test_command_line_over_file_over_default(settings_file):
    config = settings_file("adam: {lr: 1e-6, betas: [0.8, 0.9]}\ntrain.batch_size: 8\n")
    root, given = read(*config, "--adam.lr", "3e-5"), flags.parse([*config, "--adam.lr", "3e-5"], SECTIONS).given
    assert (root.adam.lr, root.adam.betas, root.train.batch_size) == (3e-5, (0.8, 0.9), 8)
    assert root.adam.deep.rate == 0.25
    assert given == {
        "adam.lr": flags.COMMAND_LINE,
        "adam.betas": f"{config[1]}:1",
        "train.batch_size": f"{config[1]}:2",
    }


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--train.batch_size=2_000"], "batch_size", 2000),
        (["--train.batch_size", "1e3"], "batch_size", 1000),
        (["--train.batch_size", "-1"], "batch_size", -1),
        (["--train.batch_size", str(2**60 + 1)], "batch_size", 2**60 + 1),
        (["--train.packing"], "packing", True),
        (["--train.packing", "True"], "packing", True),
        (["--train.packing=false"], "packing", False),
        (["--train.prompts", "8000", "20000"], "prompts", [8000, 20000]),
        (["--train.prompts="], "prompts", []),
        (["--train.names", "a", ""], "names", ["a", ""]),
        (["--train.stage", "1"], "stage", 1),
        (["--train.kind", "all"], "kind", "all"),
        (["--train.limit", "3"], "limit", 3),
        (["--train.limit", "null"], "limit", None),
        (["--train.old_limit", "null"], "old_limit", None),
        (["--train.old_limit", "2"], "old_limit", 2.0),
    ],
)
def test_values_on_the_command_line(argv, name, value):
    setting = getattr(read(*argv).train, name)
    assert setting == value
    assert type(setting) is type(value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("batch_size: 1e3", "batch_size", 1000),
        ("batch_size: 010", "batch_size", 10),
        ("packing: True", "packing", True),
        ("prompts:\n  - 1\n  - 2", "prompts", [1, 2]),
        ("prompts: []", "prompts", []),
        ("names: [no, 1:30, '']", "names", ["no", "1:30", ""]),
        ("limit: ~", "limit", None),
        ("old_limit:", "old_limit", None),
        ("stage: 0", "stage", 0),
    ],
)
def test_values_in_a_file(settings_file, text, name, value):
    indented = text.replace("\n", "\n  ")
    assert getattr(read(*settings_file(f"train:\n  {indented}\n")).train, name) == value


def test_a_group_without_keys_is_allowed(settings_file):
    assert read(*settings_file("train:\none: {}\nadam:\n  deep:\n")) == Root()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--adam.lr fast", "--adam.lr got 'fast', expected a number (command line)"),
        ("--adam.lr nan", "--adam.lr got 'nan', expected a number (command line)"),
        ("--adam.lr inf", "--adam.lr got 'inf', expected a number (command line)"),
        ("--adam.lr", "--adam.lr got nothing, expected a number (command line)"),
        ("--adam.lr 1 2", "--adam.lr got '1' '2', expected a number (command line)"),
        ("--adam.betas 0.9", "--adam.betas got '0.9', expected 2 values: a number, a number (command line)"),
        ("--train.batch_size 1.5", "--train.batch_size got '1.5', expected an integer (command line)"),
        ("--train.batch_size true", "--train.batch_size got 'true', expected an integer (command line)"),
        ("--train.packing maybe", "--train.packing got 'maybe', expected true or false (command line)"),
        ("--train.prompts 1 x", "--train.prompts got '1' 'x', expected a list, each item an integer (command line)"),
        ("--train.prompts", "--train.prompts got nothing, expected a list, each item an integer (command line)"),
        ("--train.stage 3", "--train.stage got '3', expected one of 0, 1, 2 (command line)"),
        ("--train.kind old", "--train.kind got 'old', expected one of new, all (command line)"),
        ("--train.limit x", "--train.limit got 'x', expected an integer, or null (command line)"),
        ("--adam.lr 1 --adam.lr=1", "--adam.lr is given twice (command line)"),
        ("stray --adam.lr 1", "'stray' is unexpected, every value follows a flag (command line)"),
        ("--config", "--config got nothing, expected text (command line)"),
        ("--train.batch 1", "--train.batch is unknown; did you mean --train.batch_size? (command line)"),
    ],
)
def test_wrong_command_lines(argv, message):
    assert problems(*argv.split()) == [message]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adam: {lr: fast}", "--adam.lr got 'fast', expected a number ({file}:1)"),
        ("adam.lr: [1]", "--adam.lr got '1', expected a number ({file}:1)"),
        ("adam.lr: {}", "--adam.lr got an empty group, expected a number ({file}:1)"),
        ("algo: null", "--algo got null, expected text ({file}:1)"),
        ("train: {packing: yes}", "--train.packing got 'yes', expected true or false ({file}:1)"),
        ("train: {prompts: 8000}", "--train.prompts got '8000', expected a list, each item an integer ({file}:1)"),
        ("train: {prompts: [[1]]}", "--train.prompts got '1', expected a list, each item an integer ({file}:1)"),
        ("\nadam: 5", "--adam got '5', expected a group with adam.lr, adam.betas, adam.deep.rate ({file}:2)"),
        ("algo: a\nalgo: b", "--algo is a duplicate key, first in {file}:1 ({file}:2)"),
        ("adam.lr: 1\nadam:\n  lr: 2", "--adam.lr is a duplicate key, first in {file}:1 ({file}:3)"),
        ("adam: {lr: 1}\nadam: {betas: [0, 0]}", "--adam is a duplicate key, first in {file}:1 ({file}:2)"),
        ("optimizer:\n  lr: 1", "--optimizer.lr is unknown; did you mean --adam.lr? ({file}:2)"),
        ("[1]: 2", "--? is unknown ({file}:1)"),
        ("- 1", "{file} is not a mapping of keys to values"),
        ("", "{file} is not a mapping of keys to values"),
    ],
)
def test_wrong_files(settings_file, text, message):
    config = settings_file(text)
    messages = problems(*config)
    assert len(messages) == 1
    assert messages[0] == message.format(file=config[1])


def test_files_that_cannot_be_read(settings_file, tmp_path):
    config = settings_file("algo: a\nadam: {lr: 1\ntrain: [")
    (broken,) = problems(*config)
    assert broken.startswith(f"{config[1]} cannot be read: ")
    assert "line 3" in broken
    (tmp_path / "bytes.yaml").write_bytes(b"algo: \xff")
    for name in ("missing.yaml", "bytes.yaml", "."):
        path = str(tmp_path / name)
        (problem,) = problems("--config", path)
        assert problem.startswith(f"{path} cannot be read: ")


def test_every_problem_is_reported_at_once(settings_file):
    config = settings_file("adam.lr: x\nnonsense: 1\n")
    messages = problems(*config, "--train.batch_size", "x", "--whatever", "--one.alpha", "a")
    assert len(messages) == 5


@pytest.mark.parametrize(
    ("given", "suggested"),
    [
        ("lr", "--adam.lr"),
        ("train_batch_size", "--train.batch_size"),
        ("train-batch-size", "--train.batch_size"),
        ("train.bacth_size", "--train.batch_size"),
        ("train.lr", "--adam.lr"),
        ("rat", "--adam.deep.rate"),
        ("confg", "--config"),
        ("train_batch", "--train.batch_size"),
        ("bat", "--train.batch_size"),
        ("alg", "--algo"),
    ],
)
def test_suggestions(given, suggested):
    assert problems(f"--{given}", "1") == [f"--{given} is unknown; did you mean {suggested}? (command line)"]


def test_nothing_near_nothing_suggested():
    assert problems("--zzzzzz", "1") == ["--zzzzzz is unknown (command line)"]


def test_an_ambiguous_last_component_lists_all():
    @dataclass
    class Other:
        lr: float = 0.0

    with pytest.raises(flags.SettingsError, match=r"did you mean --adam\.lr\? \(or --seed\.lr\)"):
        flags.parse(["--lr", "1"], {"seed": Other, "adam": Adam})


def test_flags_of_another_algorithm(settings_file):
    elsewhere = {"spa": "belongs to --algo spa, this run has --algo one"}
    config = settings_file("spa: {beta: 1}")
    assert problems(*config, "--spa.alpha", "1", known_elsewhere=elsewhere) == [
        "--spa.alpha belongs to --algo spa, this run has --algo one (command line)",
    ]
    parsed = flags.parse(config, SECTIONS, elsewhere)
    assert parsed.ignored == {"spa.beta": f"{config[1]}:1"} and not parsed.given


def test_names_of_another_package(settings_file):
    """Also where a group has such a name, and with dashes."""
    others = {"learning_rate": "is called --adam.lr", "train": "is called otherwise"}
    config = settings_file("learning_rate: 1\n")
    assert problems(*config, "--learning-rate", "2", "--train", "1", other_names=others) == [
        f"--learning_rate is called --adam.lr ({config[1]}:1)",
        "--learning-rate is called --adam.lr (command line)",
        "--train is called otherwise (command line)",
    ]
    config = settings_file("train: 5\n")
    assert problems(*config, other_names=others) == [f"--train is called otherwise ({config[1]}:1)"]
    assert flags.parse(settings_file("train: {stage: 1}\n"), SECTIONS, other_names=others).given.keys() == {
        "train.stage"
    }


def test_round_trip_is_exact_and_without_secrets(settings_file):
    argv = [
        "--adam.lr",
        "1e-300",
        "--adam.betas",
        "0.1",
        "0.30000000000000004",
        "--train.names",
        "true",
        "",
        "null",
        "é\n:",
    ]
    argv += ["--train.limit", "null", "--train.prompts", "1", "2", "--one.alpha", "2", "--algo", "1e3"]
    instances = flags.parse(argv, SECTIONS).instances
    text = flags.dump(instances)
    assert flags.parse(settings_file(text), SECTIONS).instances == instances
    assert list(flags.to_dict(instances)) == ["algo", "key", "adam", "train", "one"]
    secret = flags.parse(["--key", "env:HIDDEN"], SECTIONS).instances
    assert secret[""].key == "env:HIDDEN"
    assert "HIDDEN" not in flags.dump(secret)
    assert flags.to_dict(secret)["key"] == ""


def test_peek(settings_file, tmp_path):
    config = settings_file("algo: two\ntrain: {prompts: [1]}\n")
    assert flags.peek([*config, "--algo=three"], "algo") == "three"
    assert flags.peek(config, "algo") == "two"
    assert flags.peek([], "algo") is None
    assert flags.peek(config, "train.prompts") is None
    missing = ["--config", str(tmp_path / "missing.yaml")]
    assert flags.peek([*missing, "--algo", "three"], "algo") == "three"
    with pytest.raises(flags.SettingsError, match="missing.yaml"):
        flags.peek(missing, "algo")


def test_help_text():
    text = flags.help_text(SECTIONS)
    assert max(map(len, text.splitlines())) <= 120
    assert "adam\n  --adam.lr (a number; default: 5e-07)\n      peak learning rate\n" in text
    assert "--train.prompts (a list, each item an integer; default: empty)" in text
    assert "--config" in text


@dataclass
class Bounded:
    count: int = flags.setting(3, "how many", low=1)
    rate: float = flags.setting(0.1, "how fast", above=0)
    share: float = flags.setting(0.5, "of all", low=0, high=1)
    mass: float = flags.setting(1.0, "of it", above=0, high=1)
    every: int = flags.setting(-1, "steps (-1: never)", low=1, also=-1)
    betas: tuple[float, float] = flags.setting((0.9, 0.99), "decay", low=0, below=1)
    sizes: list[int] = flags.setting([], "of each", low=1)
    limit: int | None = flags.setting(None, "at most", low=0)
    name: str = flags.setting("", "text")


@pytest.mark.parametrize(
    ("name", "inside", "outside", "words"),
    [
        ("count", [1, 7], [0, -1], "at least 1"),
        ("rate", [1e-9, 5], [0, -0.1, float("nan")], "more than 0"),
        ("share", [0, 0.3, 1], [-0.01, 1.01, float("nan")], "0 to 1"),
        ("mass", [0.01, 1], [0, 1.5], "more than 0, at most 1"),
        ("every", [-1, 1, 10], [0, -2], "at least 1, or -1"),
        ("betas", [(0.0, 0.999)], [(0.9, 1.0), (-0.1, 0.5)], "at least 0, less than 1 each"),
        ("sizes", [[], [1, 2]], [[1, 0]], "at least 1 each"),
        ("limit", [None, 0], [-1], "at least 0"),
    ],
)
def test_ranges_stand_on_the_field(name, inside, outside, words):
    for value in inside:
        assert flags.out_of_range({"b": Bounded(**{name: value})}) == []
    for value in outside:
        (problem,) = flags.out_of_range({"b": Bounded(**{name: value})})
        assert problem.startswith(f"--b.{name}: ") and problem.endswith(f" is out of range, use {words}")
        assert flags.out_of_range({"b": Bounded(**{name: value})}, ("a.",)) == []
    assert f", {words}; default:" in flags.help_text({"": Bounded}).partition(f"--{name} ")[2].splitlines()[0]


@dataclass
class Command:
    adam: Adam = flags.part(lambda: Adam(lr=0.1), "lr", "deep.rate")
    train: Train = flags.part(Train)
    name: str = "x"


def test_a_part_has_some_of_a_group_as_flags_and_keeps_the_rest():
    command = flags.parse(["--adam.deep.rate", "2"], {"": Command}).instances[""]
    assert command.adam == Adam(lr=0.1, deep=Deep(rate=2.0)) and command.train == Train()
    assert flags.to_dict({"": command}) == {"name": "x", "adam": {"lr": 0.1, "deep": {"rate": 2.0}}}
    with pytest.raises(flags.SettingsError, match="--adam.betas is unknown"):
        flags.parse(["--adam.betas", "0.1", "0.2"], {"": Command})


def test_defaults_are_not_shared():
    read().train.names.append("x")
    assert read().train.names == ["all"]


@dataclass
class Unsupported:
    value: dict[str, int] = field(default_factory=dict)


@dataclass
class Reserved:
    config: str = ""


def test_sections_that_cannot_be_flags():
    with pytest.raises(TypeError, match="unsupported type"):
        flags.parse([], {"": Unsupported})
    with pytest.raises(TypeError, match="--config exists already"):
        flags.parse([], {"": Reserved})
    with pytest.raises(TypeError, match="--adam.lr exists already"):
        flags.parse([], {"": Root, "adam": Adam})
