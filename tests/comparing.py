"""For the tests of comparisons: small runs, and ``python comparing.py MOMENT [flags of compare]``, which is ``openrlhf-sgpo
compare`` that ends itself with SIGKILL at that moment: ``answers NAME``, or ``file NAME`` with half of it written."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def arguments(model: Path, data: dict[str, Path], folder: Path, seed: int, *more: str) -> list[str]:
    """A run of one round in fp32, without ``--algo`` and what only some algorithms read."""
    return [
        *("--model.model_name_or_path", str(model), "--eval.dataset", str(data["held_out"]), "--eval.max_prompts", "2"),
        *("--data.prompt_dataset", str(data["prompts"]), "--data.max_len", "128", "--ckpt.output_dir", str(folder)),
        *("--train.batch_size", "4", "--train.micro_batch_size", "2", "--train.seed", str(seed), "--adam.lr", "1e-2"),
        *("--ds.zero_stage", "0", "--ds.param_dtype", "fp32", "--rounds.count", "1", "--rollout.engine", "hf"),
        *("--rollout.max_new_tokens", "8", "--rollout.temperature", "1.0", *more),
    ]


def main(moment: str, argv: list[str]) -> int:
    from openrlhf_sgpo import run_folder
    from openrlhf_sgpo.cli.main import compare as command
    from openrlhf_sgpo.comparison import compare
    from openrlhf_sgpo.rollout import hf

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    kind, name = moment.split()
    if kind == "answers":
        generate = hf.HuggingFaceRollout.generate
        hf.HuggingFaceRollout.generate = lambda self, prompts, sampling, label: (
            die() if label == name else generate(self, prompts, sampling, label)
        )
    else:
        write = run_folder.write_text

        def half(path: Path, text: str) -> None:
            if path.name == name:
                path.with_name(path.name + ".partial").write_text(text[: len(text) // 2])
                die()
            write(path, text)

        run_folder.write_text = compare.write_text = half
    return command(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
