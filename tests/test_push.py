"""Model cards that the hub accepts, and uploads to a stand-in of it that goes on where they were cut off."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import httpx
import huggingface_hub
import pytest
from hub_server import hub
from huggingface_hub import ModelCard
from huggingface_hub.utils._http import default_client_factory
from report_folders import make_run
from tiny import make_tiny_model

from openrlhf_sgpo.cli.main import main
from openrlhf_sgpo.report.model_card import write_cards
from openrlhf_sgpo.run_folder import RunFolder, read_json, write_json


def finish_policy(folder, model, number=2):
    """A run of two rounds with a policy in the last."""
    run = RunFolder(str(make_run(folder, radius=0.1)))
    make_tiny_model(run.policy(number)) if model is None else run.policy(number).symlink_to(model)
    run.finish(number, "train", {}, ["worst_case.json", "policy"])
    for place in (1, 2):  # the helper writes curves of steps that no stage has counted
        assert "metrics" not in run.manifest(place)["stages"].get("train", {})
    return run


@pytest.fixture
def run(tmp_path):
    return finish_policy(tmp_path / "run", None)


def stated(card, title):
    """The rows of the table under a heading, by their first cell."""
    section = card.text.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {row[0].strip("`"): [cell.strip("`") for cell in row[1:]] for row in rows}


def test_the_card_tells_what_the_run_has_on_record(run):
    write_cards(run, 2, {})
    card = ModelCard.load(run.policy(2) / "README.md")
    assert card.data.to_dict() == {
        "base_model": "models/tiny",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["openrlhf-sgpo", "sgpo"],
    }
    certificate = read_json(run.round(2) / "worst_case.json")
    figures = stated(card, "Certificate of the follower")
    assert figures["value"][0] == f"{certificate['value']:.4f}" and figures["radius"][0] == "0.1000"
    assert stated(card, "Training")["sgpo.radius"][0] == "0.1"
    row = read_json(run.round(2) / "evaluation.json")
    assert (
        stated(card, "Evaluation")["round 2"][2] == f"{row['kl']:.2f} \N{PLUS-MINUS SIGN} {1.96 * row['kl_error']:.2f}"
    )
    assert stated(card, "Cost")["total"][0] == "34.5"
    assert "Held-out accuracy rose" in card.text and str(run.path.parent) not in str(card)
    (run.policy(2) / "README.md").write_text("written by a person")
    write_cards(run, 2, {})
    assert (run.policy(2) / "README.md").read_text() == "written by a person"


def test_the_card_of_a_round_knows_nothing_of_later_ones(run):
    run.policy(1).mkdir()
    write_cards(run, 1, {})
    card = ModelCard.load(run.policy(1) / "README.md")
    assert list(stated(card, "Evaluation"))[2:] == ["start", "round 0", "round 1"]
    assert stated(card, "Cost")["total"][0] == "22.5"


def test_a_licence_comes_from_the_card_of_the_base_model(run, tmp_path):
    from openrlhf_sgpo.report import model_card

    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\nbase_model: somebody/smaller\n---\n")
    data = model_card._card_of(str(base))
    assert (data.license, data.base_model) == ("mit", "somebody/smaller")
    assert model_card._card_of(str(tmp_path / "nowhere")).to_dict() == {}


def test_the_hubs_validation_accepts_the_card(run):
    """huggingface_hub's own, which asks the hub; here its client is led to the stand-in."""
    write_cards(run, 2, {})
    card = ModelCard.load(run.policy(2) / "README.md")
    with hub() as server:

        def lead(request: httpx.Request) -> None:
            assert request.url.host == "huggingface.co"
            request.url = httpx.URL(server.address + request.url.path)

        huggingface_hub.set_client_factory(lambda: httpx.Client(event_hooks={"request": [lead]}))
        try:
            card.validate()
            card.data.base_model = "not a name"
            with pytest.raises(ValueError, match="not a name is not a model"):
                card.validate()
        finally:
            huggingface_hub.set_client_factory(default_client_factory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run.path / "table.txt").unlink(), "has not ended .* train --resume continues it"),
        (lambda run: (run.policy(2) / "config.json").write_text("{}"), "bytes were written, 2 are there; restore it"),
        (lambda run: (run.policy(2) / "model.safetensors").unlink(), "model.safetensors is missing; restore it"),
        (lambda run: write_json(run.round(1) / "evaluation.json", {}), "round_1/evaluation.json: .* restore it"),
        (lambda run: run.lock(), "is in use by process"),
    ],
)
def test_a_run_that_is_not_whole_is_not_shared(change, message, run, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    change(run)
    assert main(["push", str(run.path), "--to", "me/policy"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_is_missing_is_said_at_once(run, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["push", str(run.path.parent), "--to", "policy"]) == 2
    errors = capsys.readouterr().err
    assert "is not the folder of a run" in errors and "give OWNER/NAME" in errors and "HF_TOKEN is not set" in errors
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    assert main(["push", str(run.path), "--to", "me/policy", "--role", "follower"]) == 2
    assert "no weights of a follower's own" in capsys.readouterr().err
    assert main(["push", str(run.path), "--to", "me/policy", "--token", "hf_write"]) == 2
    assert "hf_write" not in capsys.readouterr().err


@pytest.mark.slow
def test_an_upload_that_was_cut_off_goes_on(run):
    (run.policy(2) / "second.safetensors").write_bytes(b"more weights")
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_TOKEN": "hf_write", "HF_HUB_DISABLE_XET": "1"}  # the stand-in does not speak Xet's protocol
    command = [sys.executable, "-m", "openrlhf_sgpo", "push", str(run.path), "--to", "me/policy"]

    def push(*more, **changed):
        return subprocess.run([*command, *more], env=environment | changed, capture_output=True, text=True, timeout=300)

    with hub() as server:
        environment["HF_ENDPOINT"] = server.address
        server.add("models/tiny", license="apache-2.0")
        refused = push(HF_TOKEN="hf_read_only")
        assert (
            refused.returncode == 2 and "refused me/policy" in refused.stderr and "hf_read_only" not in refused.stderr
        )
        server.cut_off = 1
        broken = push()
        assert broken.returncode == 2 and "repeat the command" in broken.stderr, broken.stderr
        repository, first = server.repositories["me/policy"], list(server.sent)
        assert len(first) == 1 and not repository["commits"] and repository["private"]
        server.cut_off = None
        whole = push()
        assert whole.returncode == 0, whole.stderr
        assert whole.stdout.splitlines()[-1] == f"{server.address}/me/policy (private)"
        assert len(server.sent) == 2 and server.sent[:1] == first  # nothing twice
        files = {str(path.relative_to(run.policy(2))): path.read_bytes() for path in run.policy(2).rglob("*.*")}
        assert repository["files"] == files and "README.md" in files
        assert ModelCard(files["README.md"].decode()).data.license == "apache-2.0"
        # A later upload leaves no weights of an earlier one, which would be read in place of its own.
        repository["files"] |= {"first.safetensors": b"old", "adapter/adapter_config.json": b"{}", "notes.md": b"mine"}
        again = push()
        assert again.returncode == 0, again.stderr
        assert repository["files"] == files | {"notes.md": b"mine"}
        server.add("me/open")
        public = subprocess.run(
            [*command[:-1], "me/open"], env=environment, capture_output=True, text=True, timeout=300
        )
        assert public.returncode == 2 and "me/open is public; add --public" in public.stderr
        assert server.keys == {"hf_write", "hf_read_only"}
    # With the card, the folder is still what the run has written.
    assert main(["report", str(run.path)]) == 0
