"""SGPO and the other pair losses in TRL's own DPOTrainer, which runs for real."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from openrlhf_sgpo import solve_worst_case  # noqa: E402
from openrlhf_sgpo.finite import NotFiniteError  # noqa: E402
from openrlhf_sgpo.trl import DPOConfig, DPOTrainer  # noqa: E402

pytestmark = pytest.mark.slow
STEPS, ACCUMULATED = 4, 2


@pytest.fixture(scope="module")
def pairs():
    """Every third label is swapped, so margins of both signs stay."""
    rows = []
    for index in range(16):
        word = ["alpha", "beta", "gamma", "delta", "epsilon"][index % 5]
        answers = [word * (1 + index % 3), "no" * (1 + index % 4)]
        chosen, rejected = answers if index % 3 else answers[::-1]
        rows.append({"prompt": f"say {word} ", "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def trained(
    tiny_model,
    pairs,
    folder,
    trainer_class=DPOTrainer,
    config_class=DPOConfig,
    resume=None,
    adapter=None,
    rate=1e-3,
    save_steps=2,
    **settings,
):
    """The trainer after its steps."""
    config = config_class(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATED,
        learning_rate=rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=save_steps,
        beta=0.1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trainer = trainer_class(
        model,
        args=config,
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        peft_config=adapter,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize(
    ("algorithm", "algorithm_settings", "usual", "shared"),
    [
        ("sgpo", {"radius": 0.0}, {}, {}),
        ("dpo", None, {}, {"precompute_ref_log_probs": True}),
        ("dpo", None, {}, {"adapter": LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")}),
        ("rdpo", {"flip_rate": 0.2}, {"loss_type": ["robust"], "label_smoothing": 0.2}, {}),
    ],
)
def test_the_loss_equals_trls_step_by_step(tiny_model, pairs, tmp_path, algorithm, algorithm_settings, usual, shared):
    settings = {"algorithm": algorithm, "algorithm_settings": algorithm_settings}
    result = trained(tiny_model, pairs, tmp_path / "a", **settings, **shared)
    expected = trained(tiny_model, pairs, tmp_path / "b", trl.DPOTrainer, trl.DPOConfig, **usual, **shared)
    assert len(logged(result, "loss")) == STEPS
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "mean_token_accuracy"):
        assert logged(result, name) == pytest.approx(logged(expected, name), rel=1e-5, abs=1e-7), name
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(result)[name], value, rtol=1e-5, atol=1e-6)


def test_the_follower_is_solved_again_after_each_step(tiny_model, pairs, tmp_path):
    trainer = trained(tiny_model, pairs, tmp_path, algorithm_settings={"radius": 0.05})
    assert logged(trainer, "sgpo/gap") == pytest.approx([0.0] * STEPS, abs=1e-9)
    assert logged(trainer, "sgpo/radius") == [0.05] * STEPS
    values, plain = logged(trainer, "sgpo/value"), logged(trainer, "sgpo/empirical")
    assert all(value > loss for value, loss in zip(values, plain, strict=True))
    state = trainer._algorithm.state_dict()
    assert len(state["recent"]) == STEPS * ACCUMULATED * 2
    worst = solve_worst_case(state["recent"], 0.05, window=state["window"])
    assert worst.value == pytest.approx(values[-1], rel=1e-9)
    free = trained(tiny_model, pairs, tmp_path / "dpo", algorithm="dpo")
    assert logged(trainer, "loss")[0] == logged(free, "loss")[0], "until the first solution the loss is DPO's"
    assert logged(trainer, "loss")[-1] != logged(free, "loss")[-1]


@pytest.mark.parametrize(
    ("save_steps", "problem"),
    [(2, r"step 2: the weight model\.\S+ is not finite"), (STEPS, "step 3: the margins of a batch are not finite")],
)
def test_a_policy_that_is_lost_is_not_saved(tiny_model, pairs, tmp_path, save_steps, problem):
    """The second step has a gradient that is not finite, and margins that are."""
    with pytest.raises(NotFiniteError, match=problem):
        trained(tiny_model, pairs, tmp_path, rate=1e30, save_steps=save_steps)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_resumed_training_is_the_same_to_the_bit(tiny_model, pairs, tmp_path):
    settings = {"algorithm_settings": {"radius": 0.05}}
    whole = trained(tiny_model, pairs, tmp_path / "whole", **settings)
    again = trained(tiny_model, pairs, tmp_path / "again", resume=str(tmp_path / "whole/checkpoint-2"), **settings)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name]), name
    assert logged(whole, "sgpo/value") == logged(again, "sgpo/value")
    (tmp_path / "whole/checkpoint-2/algorithm.pt").unlink()
    with pytest.raises(ValueError, match=r"algorithm\.pt is missing"):
        trained(tiny_model, pairs, tmp_path / "third", resume=str(tmp_path / "whole/checkpoint-2"), **settings)


def test_the_example_trains_on_two_ranks_as_on_one(tiny_model, pairs, tmp_path):
    """Two ranks with one micro-batch each have the micro-batches of one rank that accumulates two, and the same follower."""
    alone = trained(tiny_model, pairs, tmp_path / "alone", algorithm_settings={"radius": 0.05})
    pairs.to_json(tmp_path / "pairs.jsonl")
    options = {
        "model_name_or_path": tiny_model,
        "dataset_name": tmp_path / "pairs.jsonl",
        "output_dir": tmp_path / "together",
        "algorithm_settings": '{"radius": 0.05}',
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": STEPS,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dtype": "float32",
    }
    example = Path(__file__).parent.parent / "examples/trl_dpo.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc_per_node=2", str(example)]
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    process = subprocess.run([*launcher, *flags], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    assert (tmp_path / "together/model.safetensors").exists()
    state = json.loads((tmp_path / f"together/checkpoint-{STEPS}/trainer_state.json").read_text())
    for name in ("loss", "sgpo/value", "sgpo/empirical", "sgpo/threshold", "sgpo/pairs", "rewards/margins"):
        together = [row[name] for row in state["log_history"] if name in row]
        assert together == pytest.approx(logged(alone, name), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    "algorithm", ["ipo", "cdpo", "sgpo_best", "spa", "iter_dpo", "ropo", "sym_po", "dr_dpo", "kl_dpo"]
)
def test_other_pair_losses_train(tiny_model, pairs, tmp_path, algorithm):
    settings = {"spa": {"extrapolation": [0.0]}}.get(algorithm)
    trainer = trained(tiny_model, pairs, tmp_path, algorithm=algorithm, algorithm_settings=settings)
    margins = logged(trainer, "rewards/margins")
    assert margins[0] == 0 and abs(margins[-1]) > 0.01
    untrained = type(trainer)(str(tiny_model), args=trainer.args, train_dataset=pairs, eval_dataset=pairs)
    assert math.isfinite(untrained.evaluate()["eval_loss"]), "before any training"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"algorithm_settings": {"radius": -1}}, "--sgpo.radius: -1.0 is out of range, use at least 0"),
        ({"algorithm_settings": {"radios": 1}}, "--sgpo.radios is unknown; did you mean"),
        ({"algorithm_settings": "radius=1"}, "algorithm_settings 'radius=1': give a dictionary, in a shell as JSON"),
        ({"algorithm_settings": {"refresh_steps": 0}}, "--sgpo.refresh_steps 0: here the follower has nothing"),
        ({"algorithm_settings": {"prox": 0.5}}, "--sgpo.prox 0.5: where margins were"),
        ({"algorithm": "spa"}, "--spa.extrapolation needs two models"),
        ({"algorithm": "w_dpo"}, "--w_dpo.rho 1.0 needs the input embeddings"),
        ({"algorithm": "slhf"}, "--algo slhf samples in every step"),
        ({"algorithm": "sgpo_transport"}, "--algo sgpo_transport moves each pair"),
        ({"algorithm": "preference_model"}, "--algo preference_model trains on pairs of its own making"),
        ({"loss_type": ["hinge"]}, "loss_type ['hinge']: algorithm=sgpo takes its place"),
        ({"label_smoothing": 0.1}, "label_smoothing 0.1 belongs to TRL's losses"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_a_model_is_loaded(pairs, tmp_path, settings, problem):
    config = DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, **settings)
    with pytest.raises(ValueError, match=re.escape(problem)):
        DPOTrainer("no/such-model", args=config, train_dataset=pairs)


def test_settings_of_trl_alone_and_columns_that_it_drops_are_refused(pairs, tmp_path):
    usual = trl.DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="give a DPOConfig of openrlhf_sgpo.trl"):
        DPOTrainer("no/such-model", args=usual, train_dataset=pairs)
    config = DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="column weight of train_dataset: TRL drops it"):
        DPOTrainer("no/such-model", args=config, train_dataset=pairs.add_column("weight", [1.0] * len(pairs)))
