"""Responses of a model to the items of a benchmark, made by the rollout engines and kept as they are made."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from openrlhf_sgpo.benchmarks.task import Item, Responses
from openrlhf_sgpo.config import Inference
from openrlhf_sgpo.content_cache import content_key
from openrlhf_sgpo.data.records import Messages
from openrlhf_sgpo.data.template import template_arguments
from openrlhf_sgpo.data.tokens import ChatFormat, load_chat
from openrlhf_sgpo.rollout import Rollout, Sample, Sampling, sampling_of, start_rollout
from openrlhf_sgpo.rollout.base import prompt_seed
from openrlhf_sgpo.run_folder import json_text, keep_rows, read_growing, read_json, write_json, write_jsonl

# Items that are answered together, and written together: what a kill can lose.
BLOCK = 64
SETTINGS = ".settings.json"  # in place of .jsonl: what answers were made with
# What says who wrote a folder, and nothing of the model.
_UNIMPORTANT = (
    *("_name_or_path", "name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"),
    *("is_local", "local_files_only"),
)


def item_hash(item: Item) -> str:
    """Of what is asked."""
    return content_key(item.id, item.turns, item.temperature)


def weights_of(folder: str) -> list[list[Any]]:
    """Name, size and time of change of each file of weights, by which a model that was trained anew is noticed; empty for a hub
    name."""
    files = sorted(path for path in Path(folder).glob("*") if path.suffix in (".safetensors", ".bin"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def identity(folder: str) -> dict[str, Any]:
    """By which a model is known again."""
    return {"model": os.path.realpath(folder) if os.path.isdir(folder) else folder, "weights": weights_of(folder)}


def kind_of(folder: str) -> str:
    """Equal for folders whose weights an engine can exchange, with the same tokenizer, template and ends of answers."""
    settings = [Path(folder, name) for name in ("config.json", "tokenizer_config.json")]
    if not settings[0].is_file() or not any(Path(folder).glob("*.safetensors")):
        return folder  # a hub name, or weights that engines cannot read into a model that is there
    texts = [Path(folder, name) for name in ("tokenizer.json", "chat_template.jinja")]
    content: list[Any] = [path.read_text(encoding="utf-8") for path in texts if path.is_file()]
    generation = Path(folder, "generation_config.json")
    content.append(read_json(generation).get("eos_token_id") if generation.is_file() else None)
    for path in filter(Path.is_file, settings):
        content.append({name: value for name, value in read_json(path).items() if name not in _UNIMPORTANT})
    return content_key(*content)


def read_responses(path: Path, items: Sequence[Item]) -> dict[str, Responses]:
    """What is there so far of these items, by id; what was made when an item asked something else does not count."""
    asked = {one.id: item_hash(one) for one in items}
    return {
        row["id"]: Responses(row["id"], tuple(row["turns"]), tuple(row["truncated"]), tuple(row["tokens"]))
        for row in read_growing(path)
        if asked.get(row["id"]) == row["asked"]
    }


def write_responses(path: Path, items: Sequence[Item], responses: Mapping[str, Responses], made_with: Any) -> None:
    """What ``read_responses`` reads, and beside it what they were made with."""
    asked = {one.id: item_hash(one) for one in items}
    write_json(path.with_suffix(SETTINGS), made_with)
    write_jsonl(path, (asdict(one) | {"asked": asked[key]} for key, one in responses.items()))


def positions(model: str, config: Inference) -> int:
    """How many tokens a model takes; as many as --data.max_len where it does not say."""
    settings = AutoConfig.from_pretrained(model, trust_remote_code=config.model.trust_remote_code)
    return int(getattr(settings, "max_position_embeddings", config.data.max_len))


class Answerer:
    """Lets models answer, one after the other, on the same engines. config: settings of engines and sampling, whose
    temperature is that of items without one of their own."""

    def __init__(self, config: Inference):
        self.config = config
        self.rollout: Rollout | None = None
        self._kind = ""

    def chat(self, folder: str, moment: datetime | None = None) -> ChatFormat:
        """The model's chat format; no weights are loaded. Raises ValueError."""
        data, trust = self.config.data, self.config.model.trust_remote_code
        return load_chat(folder, trust, "models", data.max_len, template_arguments(data.chat_template_kwargs), moment)[
            0
        ]

    def fitting(self, chat: ChatFormat, name: str, task: str, items: Sequence[Item], partial: bool) -> list[Item]:
        """The items with room for all answers within --data.max_len. Raises ValueError if that is not all of them, unless
        ``partial`` allows it, and where the chat template refuses one."""
        new, limit = self.config.rollout.max_new_tokens, self.config.data.max_len
        conversations = [_conversation(one, [""] * (len(one.turns) - 1)) for one in items]
        needed = {}
        for one, tokens in zip(items, chat.prompts(conversations), strict=True):
            if tokens is None:
                raise ValueError(
                    f"--models {name}: its chat template refuses item {one.id} of {task}, {len(one.turns)} questions one "
                    f"after the other; leave --tasks {task} out for this model"
                )
            needed[one.id] = len(tokens) + new * len(one.turns)
        fit = [one for one in items if needed[one.id] <= limit]
        if not fit or (len(fit) < len(items) and not partial):
            longest = max(needed, key=lambda key: needed[key])
            raise ValueError(
                f"--models {name}: {len(items) - len(fit)} of {len(items)} items of {task} have no room for answers of "
                f"--rollout.max_new_tokens {new}; item {longest} needs {needed[longest]} tokens. Raise --data.max_len {limit} "
                "to that, lower --rollout.max_new_tokens, or give --partial, which leaves them out"
            )
        return fit

    def answer(
        self, chat: ChatFormat, folder: str, task: str, items: Sequence[Item], path: Path, cost: dict[str, float]
    ) -> dict[str, Responses]:
        """The responses of the model in ``folder`` by item id, of which those in the JSONL file ``path`` are taken from there.

        Beside it lies NAME.settings.json, what they were made with. Raises ValueError if the file was made with something else.
        ``cost`` gets samples and tokens of what was made.
        """
        self._same_settings(folder, items, path)
        if path.exists():
            keep_rows(path, lambda row: True)  # without the half row that a killed process may have left
        found = read_responses(path, items)
        # Where a block begins does not depend on what is there, so that after a kill the same prompts share a batch.
        blocks = [
            [one for one in items[start : start + BLOCK] if one.id not in found]
            for start in range(0, len(items), BLOCK)
        ]
        missing = [block for block in blocks if block]
        for number, block in enumerate(missing, start=1):
            made = self._block(chat, folder, block, f"{task}, {number} of {len(missing)}")
            cost["samples"] = cost.get("samples", 0) + sum(len(one.turns) for one in made)
            cost["tokens_generated"] = cost.get("tokens_generated", 0) + sum(sum(one.tokens or ()) for one in made)
            rows = [asdict(one) | {"asked": item_hash(item)} for one, item in zip(made, block, strict=True)]
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(json_text(row) + "\n" for row in rows))
            found |= {one.id: one for one in made}
        return {one.id: found[one.id] for one in items}

    def decoding(self) -> dict[str, Any]:
        """How answers are drawn, as it is recorded with every score."""
        config = self.config
        variables = (
            {"chat_template_kwargs": config.data.chat_template_kwargs} if config.data.chat_template_kwargs else {}
        )
        return {
            "engine": config.rollout.engine,
            "temperature": config.rollout.temperature,
            "top_p": config.rollout.top_p,
            "max_new_tokens": config.rollout.max_new_tokens,
            "max_len": config.data.max_len,
            "dtype": config.ds.param_dtype,
            "seed": config.train.seed,
            **variables,
        }

    def close(self) -> None:
        """End what the engines started."""
        if self.rollout:
            self.rollout.close()
            self.rollout = None

    def _same_settings(self, folder: str, items: Sequence[Item], path: Path) -> None:
        settings = path.with_suffix(SETTINGS)
        # Every item has room for its answers, so that max_len does not matter to them.
        decoding = {name: value for name, value in self.decoding().items() if name != "max_len"}
        made_with: dict[str, Any] = identity(folder) | {"decoding": decoding}
        stored: dict[str, Any] = read_json(settings) if path.exists() and settings.exists() else made_with
        if all(one.temperature is not None for one in items):
            decoding["temperature"] = stored.get("decoding", decoding)["temperature"]  # nothing is answered at it
        changed = [name for name in made_with if stored.get(name) != made_with[name]]
        if changed:
            listed = "; ".join(f"{name}: {stored.get(name)} there, {made_with[name]} now" for name in changed)
            raise ValueError(
                f"{path} was made with something else ({listed}): choose another name in --models or another --out, or "
                "delete that file"
            )
        write_json(settings, made_with)

    def _block(self, chat: ChatFormat, folder: str, block: Sequence[Item], label: str) -> list[Responses]:
        """Turn by turn, and those of one temperature together."""
        answers: dict[str, list[Sample]] = {one.id: [] for one in block}
        for turn in range(max(len(one.turns) for one in block)):
            asked = [one for one in block if turn < len(one.turns)]
            of_temperature: dict[float, list[Item]] = defaultdict(list)
            for one in asked:
                own = self.config.rollout.temperature if one.temperature is None else one.temperature
                of_temperature[own].append(one)
            for temperature, group in of_temperature.items():
                contexts = [
                    chat.prompt(_conversation(one, [sample.text for sample in answers[one.id]])) for one in group
                ]
                seed = prompt_seed(self.config.train.seed, (turn,))
                sampling = replace(sampling_of(self.config.rollout, seed), temperature=temperature)
                name = label + (f", turn {turn + 1}" if turn or len(asked[0].turns) > 1 else "")
                for one, (sample,) in zip(group, self._generate(chat, folder, contexts, sampling, name), strict=True):
                    answers[one.id].append(sample)
        return [
            Responses(
                one.id,
                tuple(sample.text for sample in answers[one.id]),
                tuple(sample.truncated for sample in answers[one.id]),
                tuple(sample.tokens for sample in answers[one.id]),
            )
            for one in block
        ]

    def _generate(
        self, chat: ChatFormat, folder: str, contexts: list[tuple[int, ...]], sampling: Sampling, label: str
    ) -> list[list[Sample]]:
        if self.rollout is None or self._kind != kind_of(folder):
            self.close()
            self.rollout, self._kind = start_rollout(self.config, chat, folder), kind_of(folder)
        self.rollout.load(folder)
        return self.rollout.generate(contexts, sampling, label)


def _conversation(item: Item, answers: Sequence[str]) -> Messages:
    """The user's messages with the answers between them, up to the question that comes after the last answer."""
    messages: Messages = []
    for turn, question in enumerate(item.turns[: len(answers) + 1]):
        messages.append({"role": "user", "content": question})
        if turn < len(answers):
            messages.append({"role": "assistant", "content": answers[turn].strip()})
    return messages
