"""What is computed again in the backward pass: equal to the modules' forward, and how little is kept for it."""

from __future__ import annotations

import weakref

import pytest
import torch
import transformers
from families import GROUPS, SMALL, make_model
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from openrlhf_sgpo.packed import attention, recomputed
from openrlhf_sgpo.packed.head import Head
from openrlhf_sgpo.packed.model import accept_packings
from openrlhf_sgpo.packed.products import use_products
from openrlhf_sgpo.packed.recomputed import recomputing, use_recomputed
from openrlhf_sgpo.training.packing import pack

ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "linear"]


@pytest.mark.parametrize("of_weight", [True, False])
def test_the_gradient_of_a_norm_is_that_of_its_definition(of_weight):
    torch.manual_seed(0)
    states, gradient = (torch.randn(2, 5, 7, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(7, dtype=torch.float64)
    scale = 1 / (states.square().mean(-1, keepdim=True) + 0.1).sqrt()
    actual = recomputed.rms_norm_gradient(gradient, states, weight, scale, of_weight)
    inputs = states.clone().requires_grad_(), weight.clone().requires_grad_()
    result = inputs[1] * inputs[0] / (inputs[0].square().mean(-1, keepdim=True) + 0.1).sqrt()
    expected = torch.autograd.grad(result, inputs, gradient)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
    if of_weight:
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-12, atol=1e-12)
    else:
        assert actual[1] is None


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_gradient_of_a_gated_activation(name):
    torch.manual_seed(0)
    gate, up = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    activation = ACT2FN[name]
    torch.testing.assert_close(recomputed._Gated.apply(gate, up, activation), activation(gate) * up, rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda *inputs: recomputed._Gated.apply(*inputs, activation), (gate, up))


def make_module(kind, activation, dtype):
    torch.manual_seed(1)
    if kind is LlamaMLP:
        module = LlamaMLP(transformers.LlamaConfig(**SMALL, hidden_act=activation, mlp_bias=True))
    else:
        module = LlamaRMSNorm(32)
        nn.init.normal_(module.weight)
    return nn.Sequential(module, nn.Linear(32, 5), nn.Linear(32, 3)).to(dtype)


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "activation"), [(LlamaRMSNorm, "")] + [(LlamaMLP, name) for name in ACTIVATIONS])
def test_a_module_with_products_behind_it(kind, activation, dtype, products):
    """The same result, bit by bit, and gradient as of the module's own forward, twice from one graph."""
    modules, plain = (make_module(kind, activation, dtype) for _ in range(2))
    use_recomputed(modules)
    assert "forward" in vars(modules[0])
    if products:
        use_products(modules)
    inputs = torch.randn(1, 6, 32).to(dtype).requires_grad_()
    weights = torch.randn(1, 6, 8).to(dtype)

    def compute(modules):
        hidden = modules[0](inputs)
        return torch.cat([modules[1](hidden), modules[2](hidden)], -1)

    with recomputing():
        result = compute(modules)
    expected = compute(plain)
    if not products:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    right = torch.autograd.grad((expected * weights).sum(), (inputs, *plain.parameters()))
    # The norm computes in float32 whatever the model is in.
    exact = dtype == torch.float64 and kind is LlamaMLP
    tolerance = 1e-12 if exact else {torch.bfloat16: 0.03}.get(dtype, 2e-6)
    for retain in (True, False):
        loss = (result * weights).sum()
        gradients = torch.autograd.grad(loss, (inputs, *modules.parameters()), retain_graph=retain)
        for gradient, wanted in zip(gradients, right, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


def test_weights_that_are_taken_away_and_views_by_an_operator():
    """As with ZeRO-3, which frees weights behind a module's forward, and lets tensors pass through operators too."""

    class Passed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.detach()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    modules = make_module(LlamaRMSNorm, "", torch.float32)
    inputs = torch.randn(1, 6, 32, requires_grad=True)
    expected = torch.autograd.grad(modules[1](modules[0](inputs)).square().sum(), (inputs, modules[1].weight))
    use_recomputed(modules)
    recipes = []
    with recomputing(), pytest.MonkeyPatch.context() as patch:
        view = recomputed._Recipe.view
        patch.setattr(recomputed._Recipe, "view", lambda *arguments: recipes.append(1) or view(*arguments))
        result = modules[1](Passed.apply(modules[0](inputs)))
        weight = modules[0].weight.data.clone()
        modules[0].weight.data.zero_()
        (of_weight,) = torch.autograd.grad(result.square().sum(), modules[1].weight, retain_graph=True)
        modules[0].weight.data.copy_(weight)
        (of_inputs,) = torch.autograd.grad(result.square().sum(), inputs)
    assert recipes
    torch.testing.assert_close((of_inputs, of_weight), expected)


def test_a_result_that_was_changed_is_kept():
    modules = make_module(LlamaRMSNorm, "", torch.float32)
    inputs = torch.randn(1, 6, 32, requires_grad=True)
    expected = torch.autograd.grad(modules[1](3 * modules[0](inputs)).square().sum(), (inputs, modules[1].weight))
    use_recomputed(modules)
    with recomputing():
        result = modules[1](modules[0](inputs).mul_(3))
    torch.testing.assert_close(torch.autograd.grad(result.square().sum(), (inputs, modules[1].weight)), expected)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, LlamaMLP])
def test_second_derivatives_are_refused(kind):
    modules = make_module(kind, "silu", torch.float32)
    use_recomputed(modules)
    inputs = torch.randn(1, 6, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(modules[0](inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# Of each family's two layers and its body: norms and gated activations that are computed again.
MODULES = {
    "Llama": (5, 2),
    "Qwen2": (5, 2),
    "Qwen3": (9, 2),
    "Mistral": (5, 2),
    "Granite": (5, 2),
    "Gemma": (0, 2),
    "Olmo2": (0, 2),
    "Cohere": (0, 2),
    "Phi": (0, 0),
    "GPTNeoX": (0, 0),
}


@pytest.mark.parametrize("family", MODULES)
def test_modules_that_are_recognised(family):
    _, model = make_model(family)
    use_recomputed(model)
    functions = [module.forward.func for module in model.modules() if "forward" in vars(module)]
    assert (functions.count(recomputed._norm), functions.count(recomputed._mlp)) == MODULES[family]


def test_an_activation_with_weights_is_left_alone():
    modules = make_module(LlamaMLP, "silu", torch.float32)
    modules[0].act_fn = nn.PReLU()
    use_recomputed(modules)
    assert "forward" not in vars(modules[0])


@pytest.mark.parametrize("backward", [True, False])
def test_what_a_model_keeps_and_that_it_is_freed(backward, monkeypatch):
    """Of a token with q query and k key channels and f in the MLP, a layer keeps 2 h + 2 q + 2 k + 2 f numbers with gradient:
    neither the results of norms and activations, nor keys and outputs that attention puts together."""
    hidden, keys, inner, layers = 32, 16, 80, 2
    _, model = make_model("Llama", intermediate_size=inner)
    model.float().set_attn_implementation(attention.NAME)
    accept_packings(model)
    packing, kept = pack(GROUPS, torch.device("cpu")), {}
    keep = recomputed._keep

    def watched(tensor):
        packed = keep(tensor)
        if isinstance(packed, torch.Tensor) and not tensor.is_leaf:
            storage = packed.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes() // 4, weakref.ref(storage)
        return packed

    monkeypatch.setattr(recomputed, "_keep", watched)
    head = Head(model)
    result = model(packing=packing, figures=lambda states: head.log_probs(states, packing.targets)).sum()
    of_layer = 2 * hidden + 2 * hidden + 2 * keys + 2 * inner
    assert all(storage() is not None for _, storage in kept.values())
    assert sum(size for size, _ in kept.values()) == packing.tokens.numel() * (layers * of_layer + hidden)
    if backward:
        result.backward()
    del result
    assert not [size for size, storage in kept.values() if storage() is not None]
