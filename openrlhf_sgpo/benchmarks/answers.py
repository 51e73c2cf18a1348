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

# Items answered and written together: at most so many are lost when a process is killed.
BLOCK = 64
SETTINGS = ".settings.json"  # replaces .jsonl: the settings that produced the answers
# Configuration keys that say who wrote a folder, but nothing about the model.
_UNIMPORTANT = (
    *("_name_or_path", "name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"),
    *("is_local", "local_files_only"),
)


def item_hash(item: Item) -> str:
    """Hash of the item's question and temperature."""
    return content_key(item.id, item.turns, item.temperature)


def weights_of(folder: str) -> list[list[Any]]:
    """Name, size and modification time of each weight file, which reveal a retrained model; empty for a hub name."""
    files = sorted(path for path in Path(folder).glob("*") if path.suffix in (".safetensors", ".bin"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def identity(folder: str) -> dict[str, Any]:
    """What identifies a model across runs."""
    return {"model": os.path.realpath(folder) if os.path.isdir(folder) else folder, "weights": weights_of(folder)}


def kind_of(folder: str) -> str:
    """Equal for folders whose weights a running engine can swap: same architecture, tokenizer, template and stop tokens."""
    settings = [Path(folder, name) for name in ("config.json", "tokenizer_config.json")]
    if not settings[0].is_file() or not any(Path(folder).glob("*.safetensors")):
        return folder  # a hub name, or weights that a running engine cannot load
    texts = [Path(folder, name) for name in ("tokenizer.json", "chat_template.jinja")]
    content: list[Any] = [path.read_text(encoding="utf-8") for path in texts if path.is_file()]
    generation = Path(folder, "generation_config.json")
    content.append(read_json(generation).get("eos_token_id") if generation.is_file() else None)
    for path in filter(Path.is_file, settings):
        content.append({name: value for name, value in read_json(path).items() if name not in _UNIMPORTANT})
    return content_key(*content)


def read_responses(path: Path, items: Sequence[Item]) -> dict[str, Responses]:
    """Stored responses to these items, by id; those to an earlier wording of an item are skipped."""
    hashes = {item.id: item_hash(item) for item in items}
    return {
        row["id"]: Responses(row["id"], tuple(row["turns"]), tuple(row["truncated"]), tuple(row["tokens"]))
        for row in read_growing(path)
        if hashes.get(row["id"]) == row["asked"]
    }


def write_responses(path: Path, items: Sequence[Item], responses: Mapping[str, Responses], made_with: Any) -> None:
    """Write what ``read_responses`` reads and, beside it, the settings ``made_with``."""
    hashes = {item.id: item_hash(item) for item in items}
    write_json(path.with_suffix(SETTINGS), made_with)
    write_jsonl(path, (asdict(response) | {"asked": hashes[key]} for key, response in responses.items()))


def positions(model: str, config: Inference) -> int:
    """The model's context length in tokens; --data.max_len if its configuration does not state it."""
    settings = AutoConfig.from_pretrained(model, trust_remote_code=config.model.trust_remote_code)
    return int(getattr(settings, "max_position_embeddings", config.data.max_len))


class Answerer:
    """Generates the answers of one model after another on the same engines.

    config: engine and sampling settings; its temperature is for items that set none."""

    def __init__(self, config: Inference):
        self.config = config
        self.rollout: Rollout | None = None
        self._kind = ""

    def chat(self, folder: str, moment: datetime | None = None) -> ChatFormat:
        """The model's chat format; no weights are loaded. Raises ValueError."""
        data, trust = self.config.data, self.config.model.trust_remote_code
        arguments = template_arguments(data.chat_template_kwargs)
        return load_chat(folder, trust, "models", data.max_len, arguments, moment)[0]

    def fitting(self, chat: ChatFormat, name: str, task: str, items: Sequence[Item], partial: bool) -> list[Item]:
        """The items whose answers fit within --data.max_len. Raises ValueError if some do not fit, unless ``partial`` is set,
        and if the chat template refuses an item."""
        new, limit = self.config.rollout.max_new_tokens, self.config.data.max_len
        conversations = [_conversation(item, [""] * (len(item.turns) - 1)) for item in items]
        needed = {}
        for item, tokens in zip(items, chat.prompts(conversations), strict=True):
            if tokens is None:
                raise ValueError(
                    f"--models {name}: its chat template refuses item {item.id} of {task}, a conversation of "
                    f"{len(item.turns)} questions; leave --tasks {task} out for this model"
                )
            needed[item.id] = len(tokens) + new * len(item.turns)
        fit = [item for item in items if needed[item.id] <= limit]
        if not fit or (len(fit) < len(items) and not partial):
            longest = max(needed, key=lambda key: needed[key])
            raise ValueError(
                f"--models {name}: {len(items) - len(fit)} of {len(items)} items of {task} have no room for answers of "
                f"--rollout.max_new_tokens {new}; item {longest} needs {needed[longest]} tokens. Raise --data.max_len {limit} "
                "to that, lower --rollout.max_new_tokens, or give --partial, which skips them"
            )
        return fit

    def answer(
        self, chat: ChatFormat, folder: str, task: str, items: Sequence[Item], path: Path, cost: dict[str, float]
    ) -> dict[str, Responses]:
        """The responses of the model in ``folder`` by item id; those already in the JSONL file ``path`` are reused.

        NAME.settings.json beside it records the settings. Raises ValueError if the file was made with other settings.
        New samples and tokens are added to ``cost``.
        """
        self._same_settings(folder, items, path)
        if path.exists():
            keep_rows(path, lambda row: True)  # drops the half row that a killed process may have left
        responses = read_responses(path, items)
        # Block boundaries do not depend on what is stored, so the same prompts share a batch after a kill.
        blocks = [
            [item for item in items[start : start + BLOCK] if item.id not in responses]
            for start in range(0, len(items), BLOCK)
        ]
        missing = [block for block in blocks if block]
        for number, block in enumerate(missing, start=1):
            answered = self._block(chat, folder, block, f"{task}, {number} of {len(missing)}")
            tokens = sum(sum(response.tokens or ()) for response in answered)
            cost["samples"] = cost.get("samples", 0) + sum(len(response.turns) for response in answered)
            cost["tokens_generated"] = cost.get("tokens_generated", 0) + tokens
            rows = [asdict(done) | {"asked": item_hash(item)} for done, item in zip(answered, block, strict=True)]
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(json_text(row) + "\n" for row in rows))
            responses |= {response.id: response for response in answered}
        return {item.id: responses[item.id] for item in items}

    def decoding(self) -> dict[str, Any]:
        """How answers are drawn, as recorded with every score."""
        config, variables = self.config, self.config.data.chat_template_kwargs
        return {
            "engine": config.rollout.engine,
            "temperature": config.rollout.temperature,
            "top_p": config.rollout.top_p,
            "max_new_tokens": config.rollout.max_new_tokens,
            "max_len": config.data.max_len,
            "dtype": config.ds.param_dtype,
            "seed": config.train.seed,
            **({"chat_template_kwargs": variables} if variables else {}),
        }

    def close(self) -> None:
        """Stop the engines."""
        if self.rollout:
            self.rollout.close()
            self.rollout = None

    def _same_settings(self, folder: str, items: Sequence[Item], path: Path) -> None:
        settings = path.with_suffix(SETTINGS)
        # Only items whose answers fit are answered, so max_len does not affect them.
        decoding = {name: value for name, value in self.decoding().items() if name != "max_len"}
        made_with: dict[str, Any] = identity(folder) | {"decoding": decoding}
        stored: dict[str, Any] = read_json(settings) if path.exists() and settings.exists() else made_with
        if all(item.temperature is not None for item in items):
            decoding["temperature"] = stored.get("decoding", decoding)["temperature"]  # no item uses it
        changed = [name for name in made_with if stored.get(name) != made_with[name]]
        if changed:
            listed = "; ".join(f"{name}: stored {stored.get(name)}, now {made_with[name]}" for name in changed)
            raise ValueError(
                f"{path} was made with other settings ({listed}): choose another name in --models or another --out, or "
                "delete that file"
            )
        write_json(settings, made_with)

    def _block(self, chat: ChatFormat, folder: str, block: Sequence[Item], label: str) -> list[Responses]:
        """Answers to a block of items, turn by turn; items with the same temperature share a batch."""
        answers: dict[str, list[Sample]] = {item.id: [] for item in block}
        for turn in range(max(len(item.turns) for item in block)):
            pending = [item for item in block if turn < len(item.turns)]
            groups: dict[float, list[Item]] = defaultdict(list)
            for item in pending:
                temperature = self.config.rollout.temperature if item.temperature is None else item.temperature
                groups[temperature].append(item)
            for temperature, group in groups.items():
                contexts = [
                    chat.prompt(_conversation(item, [sample.text for sample in answers[item.id]])) for item in group
                ]
                seed = prompt_seed(self.config.train.seed, (turn,))
                sampling = replace(sampling_of(self.config.rollout, seed), temperature=temperature)
                name = label + (f", turn {turn + 1}" if turn or len(pending[0].turns) > 1 else "")
                for item, (sample,) in zip(group, self._generate(chat, folder, contexts, sampling, name), strict=True):
                    answers[item.id].append(sample)
        return [
            Responses(
                item.id,
                tuple(sample.text for sample in answers[item.id]),
                tuple(sample.truncated for sample in answers[item.id]),
                tuple(sample.tokens for sample in answers[item.id]),
            )
            for item in block
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
    """The user's messages and the answers in turn, up to the question after the last answer."""
    messages: Messages = []
    for turn, question in enumerate(item.turns[: len(answers) + 1]):
        messages.append({"role": "user", "content": question})
        if turn < len(answers):
            messages.append({"role": "assistant", "content": answers[turn].strip()})
    return messages
