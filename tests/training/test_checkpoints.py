"""Checkpoints whose files were damaged or exchanged: nothing of them is read, and training goes on from the one before."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
from safetensors.torch import load_file
from toy_losses import Pairs

from openrlhf_sgpo.algorithms.base import NoSettings
from openrlhf_sgpo.finite import NotFiniteError


@pytest.fixture
def train(make_config, groups, tokenizer, tmp_path):
    """Six steps of DPO with a checkpoint after each into a folder of this name."""
    from trainers import make_trainer, train_on_pairs

    from openrlhf_sgpo.openrlhf import build_strategy
    from openrlhf_sgpo.training.pairs import PairBatches

    config = make_config(ckpt__save_steps=1, ckpt__max_num=2)
    strategy = build_strategy(config)

    def run(name: str) -> dict:
        trainer = make_trainer(Pairs(NoSettings(), 0.1), config, strategy, tokenizer, tmp_path / name, 6)
        train_on_pairs(trainer, PairBatches(groups, [(-20.0, -20.0)] * len(groups), strategy))
        return load_file(tmp_path / name / "policy/model.safetensors")

    run.strategy = strategy
    return run


class Attack:
    """A pickle of it makes a folder wherever it is read."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


STATES = "mp_rank_00_model_states.pt"
DAMAGES = {
    "a bit": lambda folder: flip_a_bit(folder / STATES),
    "half a file": lambda folder: os.truncate(folder / STATES, (folder / STATES).stat().st_size // 2),
    "no file": lambda folder: (folder / STATES).unlink(),
    "another file": lambda folder: (folder / "more.pt").write_bytes(b"more"),
    "a pickle that acts": lambda folder: (folder / STATES).write_bytes(pickle.dumps(Attack(folder / "attacked"))),
    "no digests": lambda folder: (folder / "digests.json").unlink(),
    "half of the digests": lambda folder: os.truncate(folder / "digests.json", 30),
    "digests of another kind": lambda folder: (folder / "digests.json").write_text("[1]"),
}


@pytest.mark.slow
def test_damaged_checkpoints(train, tmp_path, monkeypatch, capsys):
    from openrlhf_sgpo.training.checkpoints import Checkpoints

    expected = train("whole")
    monkeypatch.setenv("POISONED_STEP", "5")
    with pytest.raises(NotFiniteError, match="round 1, step 5: the loss is nan"):
        train("stopped")
    monkeypatch.delenv("POISONED_STEP")
    folder = tmp_path / "stopped/checkpoints"
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_2", "step_3", "step_4"]

    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("something was unpickled"))
    for name, damage in DAMAGES.items():
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        damage(copy / "step_4")
        capsys.readouterr()
        assert Checkpoints(copy, train.strategy).latest() == 3
        said = capsys.readouterr().out
        what = "not written to its end" if "digests" in name else "damaged ("
        assert "step_4" in said and what in said and "goes on from the checkpoint of step 3" in said
        # An earlier one that is damaged is not looked at, and all that are damaged are as none.
        damage(copy / "step_2")
        assert Checkpoints(copy, train.strategy).latest() == 3
        damage(copy / "step_3")
        assert Checkpoints(copy, train.strategy).latest() == 0
        assert "goes on from the beginning" in capsys.readouterr().out
        assert not list(copy.glob("step_*")), "a damaged one would count as one of those to keep"
    monkeypatch.undo()

    DAMAGES["a pickle that acts"](folder / "step_4")
    resumed = train("stopped")
    assert all((resumed[name] == weight).all() for name, weight in expected.items())
    assert not (folder / "step_4/attacked").exists()
