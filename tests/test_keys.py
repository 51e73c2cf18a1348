"""Keys: settings point to them, and nothing that is written or printed shows one."""

from __future__ import annotations

import json
import math
import os
import subprocess

import pytest
import toy_benchmarks
import yaml
from judge_server import JudgeServer, shown
from running import ROOT, SCRIPT, arguments, forked

from openrlhf_sgpo import flags, keys
from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.config import Config

# Made up, and long enough to be searched for.
PLANTED = {
    "OPENAI_API_KEY": "sk-judge-0a1b2c3d4e5f",
    "MY_WANDB_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_planted0a1b2c3d4e5f",
    "SECOND_API_KEY": "sk-echoed-6a7b8c9d0e1f",
}
PASSWORD = "pass-word-5f6a7b"
LITERAL = "sk-literal-9z8y7x6w"
NEEDLES = [*PLANTED.values(), PASSWORD, LITERAL]
JUDGE = ["--oracle", "judge", "--judge.model", "rule"]


def problems(*argv: str) -> tuple[str, ...]:
    with pytest.raises(flags.SettingsError) as caught:
        flags.parse(argv, {"": Config})
    assert not any(needle in str(caught.value) for needle in NEEDLES)
    return caught.value.args


@pytest.mark.parametrize(
    ("name", "variable"), [("judge.api_key", "OPENAI_API_KEY"), ("logger.wandb.key", "WANDB_API_KEY")]
)
def test_a_key_itself_is_refused_with_the_variable_to_put_it_into(name, variable, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(f"{name}: {LITERAL}\n")
    for argv in (
        [f"--{name}", LITERAL],
        [f"--{name}={LITERAL}"],
        [f"--{name}", "env", LITERAL],
        ["--config", str(file)],
    ):
        (problem,) = problems(*argv)
        assert (
            problem.startswith(f"--{name} takes no key itself")
            and f"put the key into the variable {variable}" in problem
        )
    for source in ("", "env", "env:MY_KEY", "file:/run/secrets/key"):
        flags.parse([f"--{name}", source], {"": Config})
    file.write_text(f"judge: {{api_key: {LITERAL}: 3}}\n")  # no YAML: the line is not quoted either
    assert problems("--config", str(file))[0].startswith(f"{file} cannot be read: line 1: ")


@pytest.mark.parametrize("name", ["judge.base_url", "data.dataset", "reward.heads"])
def test_addresses_with_a_password_are_refused(name):
    for address in (f"https://user:{PASSWORD}@host/v1", f"http://{PASSWORD}@host:80", f"https://u:x@{PASSWORD}@host"):
        (problem,) = problems(f"--{name}", address)
        assert problem.startswith(f"--{name} is an address with a user's name or password before the @")
    flags.parse([f"--{name}", "org/name@main"], {"": Config})


def test_what_a_source_gives(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "abc-123\n")  # the end of a file, as $(cat) in some shells leaves it
    file = tmp_path / "key"
    file.write_text("def-456\n")
    assert (
        keys.read_key("", "X") == "" and keys.read_key("env", "MY_KEY") == keys.read_key("env:MY_KEY", "X") == "abc-123"
    )
    assert keys.read_key(f"file:{file}", "X") == "def-456"
    monkeypatch.delenv("X", raising=False)
    file.write_text(" \n")
    for source, reason in {
        "env": "the variable X is not set",
        "env:Y_Y": "the variable Y_Y is not set",
        f"file:{file}": "is empty",
        "file:/no/such": r"cannot be read \(FileNotFoundError\)",
        LITERAL: "expected env, env:NAME or file:PATH",
    }.items():
        with pytest.raises(ValueError, match=reason):
            keys.read_key(source, "X")
    for bad in (f"{LITERAL}\nmore", f"{LITERAL} more", f"{LITERAL}\x7f", f"{LITERAL}ä"):
        monkeypatch.setenv("X", bad)
        with pytest.raises(
            ValueError, match="holds no valid key: it contains a space, a line break or a special"
        ) as caught:
            keys.read_key("env", "X")
        assert LITERAL not in str(caught.value) and LITERAL not in keys.redacted(f"Illegal header {bad!r}")


def test_messages_are_redacted(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHORT_TOKEN", "a")
    text = f"a plan: {PLANTED['HF_TOKEN']}, https://user:{PASSWORD}@host/path?x=1, {PLANTED['SECOND_API_KEY']}!"
    assert keys.redacted(text) == "a plan: [hidden], https://[hidden]@host/path?x=1, [hidden]!"
    keys.read_key("env:MY_WANDB_KEY", "")
    assert keys.redacted(PLANTED["MY_WANDB_KEY"]) == "[hidden]"


def test_variables_that_look_like_keys_are_neither_shown_nor_inherited(monkeypatch):
    names = [
        *PLANTED,
        "AWS_SECRET_ACCESS_KEY",
        "github_token",
        "PGPASSWORD",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "DB_PASSWD",
    ]
    planted = {name: f"planted-{number}-value" for number, name in enumerate(names)}
    kept = {
        "PATH": "/usr/bin-kept",
        "TOKENIZERS_PARALLELISM": "false-kept",
        "HF_HOME": "/kept/home",
        "KEYBOARD": "german-kept",
    }
    assert keys.without_keys(kept | planted) == kept
    for name, value in (kept | planted).items():
        monkeypatch.setenv(name, value)
    assert keys.redacted(" ".join(planted.values())) == " ".join(["[hidden]"] * len(planted))
    assert keys.redacted(" ".join(kept.values())) == " ".join(kept.values())


def test_of_a_suite_with_a_key_nothing_is_written(tmp_path, capsys):
    suite = {
        "out": str(tmp_path / "out"),
        "seeds": [1],
        "algorithms": [
            {"name": "a", "settings": {"judge.api_key": LITERAL}},
            {"name": "b", "settings": {"algo": "dpo"}},
        ],
        "common": {"judge": {"base_url": f"https://u:{PASSWORD}@host/v1"}, "logger": {"wandb.key": 123456789012}},
        "compare": {"judge": {"api_key": LITERAL}},
    }
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    assert main(["compare", "--suite", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("takes no key itself") == 3 and said.count("an address with a user's name") == 1
    assert not any(needle in said for needle in [*NEEDLES, "123456789012"])
    assert not (tmp_path / "out").exists()


def test_the_launcher_does_not_see_a_key():
    command = ["bash", str(SCRIPT), "--algo", "dpo", "--judge.api_key", LITERAL]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert process.returncode == 2 and process.stderr.startswith("error: ")
    assert "--judge.api_key takes no key itself" in process.stderr and LITERAL not in process.stdout + process.stderr


class Echo(JudgeServer):
    """Sends the key back, in errors and in answers."""

    def _reply(self, request, body, text, mode):
        self.key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if mode == "echo":
            reply = json.dumps({"error": {"message": f"Incorrect API key provided: {self.key}", "code": None}}).encode()
            request.send_response(401)
            request.send_header("Content-Type", "application/json")
            request.send_header("Content-Length", str(len(reply)))
            request.end_headers()
            request.wfile.write(reply)
        else:
            super()._reply(request, body, text, mode)


def leaks(folder, *texts: str, but=()) -> list[str]:
    """Which keys are in the texts, or in names and bytes of files below the folder."""
    leaks = []
    files = [path for path in folder.rglob("*") if path.is_file() and path not in but]
    contents = {str(path): os.fsencode(path) + path.read_bytes() for path in files}
    contents |= {f"text {number}": text.encode() for number, text in enumerate(texts)}
    for place, content in contents.items():
        leaks += [f"{needle} in {place}" for needle in NEEDLES if needle.encode() in content]
    return leaks


@pytest.fixture
def planted(tmp_path, monkeypatch):
    for name, value in {**PLANTED, "HOME": tmp_path / "home", "WANDB_MODE": "offline", "WANDB_DIR": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    (tmp_path / "home").mkdir()


@pytest.mark.slow
def test_an_evaluation_leaves_no_key_behind(planted, tmp_path, monkeypatch):
    answers, file, out = tmp_path / "answers.jsonl", tmp_path / "key", tmp_path / "out"
    rows = [{"question_id": 81 + number, "turns": ["an answer", "more"]} for number in range(3)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.write_text(PLANTED["SECOND_API_KEY"] + "\n")
    monkeypatch.delenv("SECOND_API_KEY")  # the file is the only place that has it

    def rule(text):
        return [(f"{toy_benchmarks.rule(text)[0][0]} Your key is {server.key}", -0.1)]

    with Echo(judge=rule) as server:
        folder = toy_benchmarks.mt_bench(tmp_path)
        command = ["evaluate", "--models", f"m={answers}", "--tasks", "mt_bench", "--mt_bench.folder", str(folder)]
        command += ["--mt_bench.unverified", "--judge.model", "rule", "--judge.base_url", server.url, "--out", str(out)]
        command += ["--judge.api_key", f"file:{file}"]
        server.plan = lambda *_: "echo"
        refused = forked(None, *command)
        assert refused.returncode == 2 and "Incorrect API key provided: [hidden]" in refused.stderr
        server.plan = lambda *_: None
        done = forked(None, *command)
        assert done.returncode == 0, done.stderr[-3000:]
        assert set(server.keys) == {f"Bearer {PLANTED['SECOND_API_KEY']}"}
    address = forked(None, *command[:-2], "--judge.base_url", f"http://u:{PASSWORD}@127.0.0.1/v1")
    literal = forked(None, *command[:-1], LITERAL)
    assert address.returncode == literal.returncode == 2
    outputs = [text for process in (refused, done, address, literal) for text in (process.stdout, process.stderr)]
    assert "Your key is [hidden]" in next((out / "judgements").glob("*.jsonl")).read_text()
    assert leaks(tmp_path, *outputs, but=[file]) == []


@pytest.mark.slow
def test_a_run_and_a_suite_leave_no_key_behind(planted, tiny_model, tiny_data, tmp_path):
    """With W&B, which writes down the command line, the settings and the output."""

    def rule(text):
        first, second = (sum(map(ord, answer)) % 97 / 30 for answer in shown(text))
        share = 1 / (1 + math.exp(second - first))
        return [("A", math.log(share)), ("B", math.log(1 - share)), (server.key, -20.0)]

    with Echo(judge=rule) as server:
        settings = ["--judge.base_url", server.url, "--judge.api_key", "env:SECOND_API_KEY"]
        logged = ["--logger.wandb.key", "env:MY_WANDB_KEY", "--rounds.count", "1"]
        words = arguments(tiny_model, tiny_data, tmp_path / "run", *JUDGE, *settings)
        place = words.index("--rounds.count")
        run = forked(None, "train", *words[:place], *words[place + 2 :], *logged)
        assert run.returncode == 0, run.stderr[-3000:]
        flat = dict(zip(words[::2], words[1::2], strict=True)) | dict(zip(logged[::2], logged[1::2], strict=True))
        common = {flag.removeprefix("--"): value for flag, value in flat.items() if flag != "--ckpt.output_dir"}
        suite = {
            "out": str(tmp_path / "suite"),
            "seeds": [1],
            "common": common,
            "algorithms": [
                {"name": "a", "settings": {"sgpo.radius": 0}},
                {"name": "b", "settings": {"sgpo.radius": 0.1}},
            ],
            "compare": {"oracle": "judge", "judge.model": "rule", "judge.base_url": server.url, "judge.api_key": "env"},
        }
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump(suite))
        compared = forked(None, "compare", "--suite", str(path))
        assert compared.returncode == 0, compared.stderr[-3000:]
        assert set(server.keys) == {f"Bearer {PLANTED[name]}" for name in ("OPENAI_API_KEY", "SECOND_API_KEY")}
    assert list(tmp_path.rglob("*.wandb")) and (tmp_path / "suite/comparison/table.txt").exists()
    assert "[hidden]" in (tmp_path / "run/judgements/judge.jsonl").read_text()
    assert leaks(tmp_path, run.stdout, run.stderr, compared.stdout, compared.stderr) == []
