"""Matrix products by oneDNN against the definition in float64, with their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from openrlhf_sgpo.packed import products


@pytest.fixture(params=["oneDNN", "torch"])
def way(request, monkeypatch):
    monkeypatch.setattr(products, "_suits_processor", lambda: request.param == "oneDNN")
    if request.param == "oneDNN" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch is built without oneDNN")
    return request.param


def close(actual, expected, dtype):
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_its_gradients(way, dtype, bias):
    torch.manual_seed(0)
    exact = nn.Linear(24, 10, bias=bias, dtype=torch.float64)
    layer = nn.Linear(24, 10, bias=bias, dtype=dtype)
    exact.load_state_dict(layer.state_dict())
    products.use_products(nn.Sequential(layer))
    states = torch.randn(2, 9, 12, dtype=dtype)[..., ::2].repeat(1, 1, 4).requires_grad_()
    weights = torch.randn(2, 10, 9, dtype=dtype).transpose(1, 2)  # not contiguous
    close(layer(states), exact(states.double()), dtype)
    with torch.no_grad():
        for part in (states, states[:, :1], states[0], states[0, 0]):
            close(layer(part), exact(part.double()), dtype)
        assert layer(states[:0]).shape == (0, 9, 10)
    actual = torch.autograd.grad((layer(states) * weights).sum(), (states, *layer.parameters()))
    inputs = states.double().detach().requires_grad_()
    expected = torch.autograd.grad((exact(inputs) * weights).sum(), (inputs, *exact.parameters()))
    for gradient, right in zip(actual, expected, strict=True):
        close(gradient, right, dtype)


def test_a_frozen_layer_passes_gradients_on_and_keeps_no_input(way):
    layer = nn.Linear(6, 4).requires_grad_(False)
    products.use_products(nn.Sequential(layer))
    states, kept = torch.randn(5, 6, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        result = layer(states)
    if way == "oneDNN":
        assert {tensor.untyped_storage().data_ptr() for tensor in kept} == {layer.weight.data_ptr()}
    result.sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(states.grad, layer.weight.sum(0).expand(5, 6))


@pytest.mark.parametrize("add", [True, False])
def test_products_of_views(way, add):
    left, right, more = torch.randn(7, 5), torch.randn(7, 3), torch.randn(5, 3)
    actual = products.product(left.T, right.T, more if add else None)
    close(actual, left.double().T @ right.double() + add * more, torch.float32)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(0, 3, 2), (2, 0, 3), (2, 3, 0)])
def test_products_of_nothing(way, rows, inner, columns):
    actual = products.product(torch.ones(rows, inner), torch.ones(columns, inner))
    assert torch.equal(actual, torch.full((rows, columns), float(inner)))


def test_torch_s_switch_is_heeded(monkeypatch):
    monkeypatch.setattr(products, "_suits_processor", lambda: True)
    numbers = torch.zeros(1)
    assert not products.by_onednn(numbers, torch.zeros(0))
    assert products.by_onednn(numbers) and not products.by_onednn(numbers, numbers.double())
    with torch.backends.mkldnn.flags(enabled=False):
        assert not products.by_onednn(numbers)
