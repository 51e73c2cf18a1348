"""Log-probabilities from hidden states against the plain head: values, gradients, and what is in memory."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig

from openrlhf_sgpo.packed import head
from openrlhf_sgpo.packed.head import Head

CONFIGS = {
    "plain": {"model_type": "llama"},
    "scaled": {"model_type": "cohere", "logit_scale": 0.25},
    "divided": {"model_type": "granite", "logits_scaling": 8.0},
    "capped": {"model_type": "gemma3_text", "final_logit_softcapping": 3.0},
}


def as_the_model_has_it(logits, name):
    """What transformers' models do behind their heads."""
    if name == "scaled":
        return logits * 0.25
    if name == "divided":
        return logits / 8.0
    return torch.tanh(logits / 3.0) * 3.0 if name == "capped" else logits


def make_head(name, module):
    config = SimpleNamespace(vocab_size=module.out_features, **CONFIGS[name])
    config.get_text_config = lambda: config
    return Head(SimpleNamespace(config=config, get_output_embeddings=lambda: module))


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setitem(head.ELEMENTS, "cpu", 1)  # tiles of 64 tokens


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_values_and_gradients_are_those_of_the_plain_head(small_tiles, name, temperature, dtype, tolerance):
    torch.manual_seed(0)
    module = nn.Linear(16, 150, bias=name == "plain").to(dtype)
    states = (3 * torch.randn(9, 16)).to(dtype).requires_grad_()
    targets = torch.tensor([0, 63, 64, 64, 127, 128, 149, 3, 64])  # first and last of tiles, and one repeated
    weights = torch.linspace(-1, 1, 9)

    def gradients(log_probs):
        inputs = (states, *module.parameters())
        return [gradient.double() for gradient in torch.autograd.grad((log_probs * weights).sum(), inputs)]

    logits = as_the_model_has_it(module(states).to(torch.promote_types(dtype, torch.float32)), name) / temperature
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    actual = make_head(name, module).log_probs(states, targets, temperature)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    for gradient, wanted in zip(gradients(actual), gradients(expected), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max())
    assert type(module) is nn.Linear and "forward" not in vars(module)


@pytest.mark.parametrize("name", CONFIGS)
def test_in_chunks_gradients_are_those_of_the_plain_head(small_tiles, name):
    """Of divergences over the whole vocabulary, and of heads with adapters."""
    torch.manual_seed(0)
    module = nn.Linear(16, 150, bias=False).double()
    states = (3 * torch.randn(9, 16).double()).requires_grad_()
    targets = torch.arange(9)
    module_head = make_head(name, module)
    actual = head.in_chunks(partial(head.log_probs_from, module_head, 0.7), (module_head,), states, targets)
    expected = (as_the_model_has_it(module(states), name) / 0.7).log_softmax(-1)[targets, targets]
    torch.testing.assert_close(actual, expected)
    weights = torch.linspace(-1, 1, 9)
    gradients = [torch.autograd.grad((each * weights).sum(), (states, module.weight)) for each in (actual, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_finite_differences(small_tiles, name):
    torch.manual_seed(1)
    scaling, targets = make_head(name, nn.Linear(3, 70)).scaling, torch.tensor([0, 69, 65, 2])
    states, weight, bias = (torch.randn(*shape).double().requires_grad_() for shape in ((4, 3), (70, 3), (70,)))
    apply = head._LogProbs.apply
    assert torch.autograd.gradcheck(
        lambda states, weight, bias: apply(states, weight, bias, targets, scaling, 0.8), (states, weight, bias)
    )


def test_a_frozen_head_gets_no_gradient():
    module = nn.Linear(8, 100, bias=False).requires_grad_(False)
    states = torch.randn(5, 8, requires_grad=True)
    make_head("plain", module).log_probs(states, torch.arange(5)).sum().backward()
    assert module.weight.grad is None and states.grad.abs().sum() > 0


def test_a_head_with_an_adapter_goes_by_its_logits():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    states, targets = torch.randn(7, config.hidden_size), torch.arange(7)
    expected = model.lm_head(states).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    log_probs = Head(model).log_probs(states, targets)
    torch.testing.assert_close(log_probs, expected)
    log_probs.sum().backward()
    assert all(weight.grad.abs().sum() > 0 for name, weight in adapted.named_parameters() if "lora_B" in name)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made, weights and their gradients aside."""

    def __init__(self, *weights):
        super().__init__()
        self.shapes = {weight.shape for weight in weights}
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **keywords or {})
        results = result if isinstance(result, (tuple, list)) else [result]
        for tensor in results:
            if isinstance(tensor, torch.Tensor) and tensor.shape not in self.shapes and tensor._base is None:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_does_not_grow_with_the_vocabulary():
    largest = {}
    for vocabulary in (32_000, 256_000):
        module = nn.Linear(4, vocabulary, bias=False)
        states = torch.randn(64, 4, requires_grad=True)
        with Largest(module.weight, module.weight.T) as watch:
            log_probs = make_head("plain", module).log_probs(states, torch.arange(64))
            log_probs.sum().backward()
        largest[vocabulary] = watch.elements
    assert largest[256_000] == largest[32_000] <= head.ELEMENTS["cpu"] < 64 * 32_000
    with Largest(module.weight, module.weight.T) as watch:
        module(states).logsumexp(-1).sum().backward()
    assert watch.elements == 64 * 256_000, "the plain head does keep them, and the watch sees it"


def test_scaling_of_a_config():
    assert head.Scaling.of(PretrainedConfig()) == (1.0, None)
