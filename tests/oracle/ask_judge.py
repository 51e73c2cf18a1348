"""Asks the oracle ``judge`` for preferences and prints them: python ask_judge.py FOLDER URL. Tests kill it, and start it as
one of several ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from openrlhf_sgpo import ranks
from openrlhf_sgpo.config import Config
from openrlhf_sgpo.oracle import Answer, Question, Resources
from openrlhf_sgpo.oracle.judge import Judge


def questions(count: int, answers: int = 3) -> list[Question]:
    """Question k has answers with different numbers of the word good."""
    return [
        Question(
            f"q-{k}",
            [{"role": "user", "content": f"Question {k}?"}],
            tuple(Answer(f"answer {i} to {k}" + " good" * ((i * (k + 1)) % 4)) for i in range(answers)),
        )
        for k in range(count)
    ]


def make_judge(folder: Path, url: str, **settings: Any) -> Judge:
    config = Config()
    for name, value in {"base_url": url, "model": "rule", "timeout": 30.0, "concurrency": 4, **settings}.items():
        setattr(config.judge, name, value)
    nothing: Any = None
    return Judge(Resources(config, nothing, nothing, nothing, folder))


if __name__ == "__main__":
    if "RANK" in os.environ:
        from torch import distributed

        ranks.listen_where_named()
        distributed.init_process_group("gloo")
    judge = make_judge(Path(sys.argv[1]), sys.argv[2], max_retries=0)
    try:
        preferences = judge.preferences(questions(8), "test")
    finally:
        ranks.part_ways(failed=False)
    print(json.dumps({"preferences": preferences, "usage": judge.usage()}))
