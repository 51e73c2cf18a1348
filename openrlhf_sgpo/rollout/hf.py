"""Rollouts with transformers and its key-value cache, for machines without vLLM. Every rank samples its part of the
prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from openrlhf_sgpo import ranks
from openrlhf_sgpo.config import DTYPES, Inference
from openrlhf_sgpo.data.records import Answer
from openrlhf_sgpo.data.tokens import ChatFormat
from openrlhf_sgpo.finite import NotFiniteError, check_complete
from openrlhf_sgpo.memory import release_memory
from openrlhf_sgpo.openrlhf.weights import PolicyWeights
from openrlhf_sgpo.output import Progress
from openrlhf_sgpo.packed.products import use_products
from openrlhf_sgpo.rollout.base import Sampling, Stop, prompt_seed
from openrlhf_sgpo.shared_files import local


class Mixture(LogitsProcessor):
    """The next token from the mixture of ``Sampling.share``. The reference has its own key-value cache.

    attention: mask of the left-padded prompts, shape (rows, length).
    """

    def __init__(self, reference: Any, share: float, attention: Tensor):
        self.reference = reference
        self.share = share
        self.attention = attention
        self.cache = DynamicCache(config=reference.config)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cached = self.cache.get_seq_length()
        new = input_ids[:, cached:]
        if cached:
            self.attention = torch.cat([self.attention, torch.ones_like(new)], dim=1)
        output = self.reference(
            new,
            attention_mask=self.attention,
            position_ids=(self.attention.cumsum(-1) - 1).clamp(min=0)[:, cached:],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return (1 - self.share) * scores + self.share * output.logits[:, -1].to(scores)


class StopText(StoppingCriteria):
    """Ends the rows whose response, after a prompt of ``length`` tokens, contains the text of ``stop``."""

    def __init__(self, stop: Stop, length: int):
        self.stop = stop
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        rows = input_ids[:, self.length :].tolist()
        return torch.tensor([self.stop.reached(row) for row in rows], device=input_ids.device)


class Finite(LogitsProcessor):
    """Records in ``all``, shape (), whether all distributions sampled from were finite. The others are replaced by uniform
    ones, so all ranks finish sampling and raise the error together."""

    def __init__(self, device: torch.device):
        self.all = torch.ones((), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = scores.logsumexp(-1, keepdim=True).isfinite()
        self.all &= finite.all()
        return scores.where(finite, 0.0)


class HuggingFaceRollout:
    """One copy of the policy per rank, on the rank's device. reference: the folder of a model that is mixed with it; empty if
    none is."""

    def __init__(self, config: Inference, chat: ChatFormat, folder: str, reference: str = ""):
        self.config = config
        self.tokenizer = chat.tokenizer
        self.stop = Stop(chat)
        self.weights: str | PolicyWeights = ""
        self.model: Any = None
        self.load(folder)
        self.reference = self._load(reference) if reference else None

    def load(self, weights: str | PolicyWeights) -> None:
        if weights == self.weights:
            return
        if isinstance(weights, str):
            self.model = None  # frees the old copy before the new one is loaded
            self.model = self._load(weights)
        else:
            parameters = dict(self.model.named_parameters())
            with torch.no_grad():
                for name, weight in weights:
                    parameters[name].copy_(weight)
        self.weights = weights

    def awake(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _load(self, folder: str) -> Any:
        folder = local(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[self.config.ds.param_dtype],
            attn_implementation=self.config.ds.attn_implementation,
            trust_remote_code=self.config.model.trust_remote_code,
            output_loading_info=True,
        )
        model, report = loaded
        check_complete(folder, report)
        model = model.to(torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
        use_products(model.eval())
        self.stop.add_ends_of(folder, self.config.model.trust_remote_code)
        # Of a model's generation settings only the end tokens are used, as in vLLM: with a repetition penalty, for example,
        # samples would not come from the distribution that is scored and trained.
        model.generation_config = GenerationConfig(bos_token_id=model.generation_config.bos_token_id)
        return model

    def generate(self, prompts: list[tuple[int, ...]], sampling: Sampling, label: str) -> list[list[Answer]]:
        """Raises NotFiniteError on every rank if the model's next-token probabilities are not finite."""
        size = self.config.rollout.batch_size
        rank, world = distributed.get_rank(), distributed.get_world_size()
        # Prompts of similar length share a batch. The batches do not depend on the number of ranks.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        rank_samples: dict[int, list[Answer]] = {}
        finite = Finite(self.model.device)
        for batch in Progress(batches[rank::world], desc=label, unit="batch", disable=rank != 0 or not label):
            rank_samples |= zip(batch, self._sample([prompts[i] for i in batch], sampling, finite), strict=True)
        ranks.raise_together(None if finite.all else self._not_finite())
        merged = {index: samples for part in ranks.gather(rank_samples) for index, samples in part.items()}
        return [merged[index] for index in range(len(prompts))]

    def stream(
        self, prompt: tuple[int, ...], sampling: Sampling, streamer: BaseStreamer, stopping: StoppingCriteria
    ) -> Answer:
        """A sample by this process alone. streamer: gets the prompt's tokens, then each token as it is sampled. stopping: ends
        the response early. Raises NotFiniteError as ``generate`` does."""
        finite = Finite(self.model.device)
        ((answer,),) = self._sample([prompt], sampling, finite, streamer, [stopping])
        if not finite.all:
            raise self._not_finite()
        return answer

    def _not_finite(self) -> NotFiniteError:
        name = f"the model {self.weights}" if isinstance(self.weights, str) else "the policy"
        return NotFiniteError(f"the next-token probabilities of {name} are not finite")

    @torch.no_grad()
    def _sample(
        self,
        prompts: list[tuple[int, ...]],
        sampling: Sampling,
        finite: Finite,
        streamer: BaseStreamer | None = None,
        stopping: Sequence[StoppingCriteria] = (),
    ) -> list[list[Answer]]:
        """Samples a left-padded batch. The random numbers depend on its first prompt: transformers has a single generator."""
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        tokens = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        attention = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        device = self.model.device
        rows = attention.repeat_interleave(sampling.n, dim=0).to(device)
        processors = [Mixture(self.reference, sampling.share, rows), finite] if sampling.share else [finite]
        strategy: dict[str, Any] = {"do_sample": False}  # at temperature 0, as in vLLM
        if sampling.temperature > 0:
            strategy = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(prompt_seed(sampling.seed, prompts[0]))
            output = self.model.generate(
                tokens.to(device),
                attention_mask=attention.to(device),
                logits_processor=processors,
                num_return_sequences=sampling.n,
                max_new_tokens=min(sampling.max_new_tokens, self.config.data.max_len - longest),
                **strategy,
                stopping_criteria=[*stopping, *([StopText(self.stop, longest)] if self.stop.text else [])],
                streamer=streamer,
                eos_token_id=sorted(self.stop.tokens),
                pad_token_id=pad,
                use_cache=True,
            )
        samples = [self.stop.sample(row) for row in output[:, longest:].tolist()]
        return [samples[start : start + sampling.n] for start in range(0, len(samples), sampling.n)]

    @torch.no_grad()
    def log_probs(self, sequences: list[tuple[int, ...]]) -> list[list[float]]:
        results = []
        for sequence in sequences:
            tokens = torch.tensor([sequence], device=self.model.device)
            logits = self.model(tokens).logits[0, :-1].float()
            results.append((logits.gather(-1, tokens[0, 1:, None])[:, 0] - logits.logsumexp(-1)).tolist())
        return results

    def close(self) -> None:
        self.model = self.reference = None
        release_memory()
