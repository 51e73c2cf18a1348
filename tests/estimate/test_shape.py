"""Counts on the meta device against published numbers, and against what follows from a layer's definition."""

from __future__ import annotations

import json

import pytest

from openrlhf_sgpo.config import LoraSettings, ModelSettings
from openrlhf_sgpo.estimate.shape import model_shape


@pytest.mark.parametrize(("name", "parameters"), [("Mistral-7B-v0.1", 7_241_732_096), ("Llama-3-8B", 8_030_261_248)])
def test_parameters_are_those_of_the_published_models(published, name, parameters):
    shape = model_shape(ModelSettings(published[name]), "bf16", LoraSettings())
    assert shape.parameters == shape.trained == parameters
    assert shape.multiplied == parameters - shape.embedding
    assert shape.kv_elements == 2 * 32 * 8 * 128


def test_a_layer_keeps_what_follows_from_its_definition(published):
    """Padded, 16 h + 4 (q + k) + 8 f bytes in half precision: two norms, each with its input in float32 (4 h), the normalised
    input and its product with the norm's weight (2 h each); queries, keys, values and output; and four tensors of the MLP.
    Packed, 4 h + 4 (q + k) + 4 f: of a norm the input, and of the MLP gate and up. Numbers per head and per norm are 4 bytes
    each."""
    hidden, keys, inner, heads = 4096, 1024, 14336, 32
    for dtype, element in (("bf16", 2), ("fp32", 4)):
        shape = model_shape(ModelSettings(published["Llama-3-8B"]), dtype, LoraSettings())
        attention = element * (2 * hidden + 2 * keys) + 4 * heads
        padded = 2 * (4 + 2 * element) * hidden + attention + 4 * element * inner + 2 * 4
        packed = 2 * element * hidden + attention + 2 * element * inner + 2 * 4
        # The first layer alone gets the embeddings, which nothing else keeps.
        assert shape.padded.layer == pytest.approx(padded, rel=1e-3)
        assert shape.packed.layer == pytest.approx(packed, rel=1e-3)
        assert shape.padded.largest == shape.packed.largest == element * inner


def test_adapters_are_counted_by_their_definition(tiny_model):
    """r (in + out) for each linear layer of a block."""
    rank, hidden, keys, inner, layers = 16, 64, 32, 128, 2
    whole = model_shape(ModelSettings(str(tiny_model)), "bf16", LoraSettings())
    shape = model_shape(ModelSettings(str(tiny_model)), "bf16", LoraSettings(rank=rank))
    sides = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 3
    assert shape.trained == layers * rank * sum(map(sum, sides))
    assert shape.parameters == whole.parameters == whole.trained


def test_a_model_that_cannot_be_counted_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no configuration can be read .* its weights are not needed"):
        model_shape(ModelSettings(str(tmp_path)), "bf16", LoraSettings())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match="cannot count a model of type t5"):
        model_shape(ModelSettings(str(tmp_path)), "bf16", LoraSettings())
