"""Scales of activations and outlier columns are those of a sequence's tokens: neither padding nor neighbours matter."""

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from loralab.adapters.hooks import BatchSlice
from loralab.errors import ConfigError
from loralab.forward.stacked import Forward
from loralab.forward.unpadded import mask_of
from loralab.numerics import int8_product
from loralab.quantization.int8_product import Int8Product
from loralab.quantization.llm_int8 import LLMInt8
from loralab.quantization.loading import convert_model
from loralab.quantization.sequences import Sequences, watch

# small thresholds: random bases have no values of 6
SCHEMES = {
    "absmax": Int8Product(granularity="tensor"),
    "zeropoint": Int8Product(granularity="tensor", zero_point=True),
    "absmax_row_decomposed": Int8Product(granularity="row", threshold=1.5),
    "zeropoint_vector_decomposed": Int8Product(zero_point=True, threshold=1.5),
    "absmax_vector": Int8Product(),
    "llm_int8": LLMInt8(threshold=1.5),
}
FAMILIES = ("llama", "gpt2", "distilbert", "roberta", "t5")


def ragged(rows, seed=0):
    """Rows of 5, 9, 6, ... tokens."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 258, (5 + 4 * (i % 2) + i // 2,), generator=random) for i in range(rows)]


def batch(rows, width, task="causal_lm", decoder=None):
    """Right-padded; pads are 1, whose embedding is as loud as any other's."""
    ids = torch.stack([pad(row, (0, width - len(row)), value=1) for row in rows])
    mask = torch.stack([pad(torch.ones_like(row), (0, width - len(row))) for row in rows])
    made = {"input_ids": ids, "attention_mask": mask}
    if task == "seq2seq_lm":
        target = torch.stack([pad(row.flip(0), (1, decoder - len(row)), value=0) for row in rows])
        made["decoder_input_ids"] = target
    return made


def assert_same(found, expected):
    """Up to the rounding of float32 products; a scale 30 times the tokens' would move logits by percents."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * max(1.0, float(expected.abs().max())))


@pytest.fixture
def quantized(load_base):
    def make(family, scheme):
        torch.manual_seed(1)
        base = load_base(family)
        model = base.model.eval()
        for embedding in model.modules():
            if isinstance(embedding, nn.Embedding):
                embedding.weight.data[1] *= 30.0  # padding that would set every scale
        convert_model(model, SCHEMES[scheme])
        return model.double(), base.spec.task  # attention rounds by 1e-16: no code falls on the other side of a half

    return make


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_and_neighbours_change_nothing(quantized, family, scheme):
    model, task = quantized(family, scheme)
    rows = ragged(4)
    together = model(**batch(rows, 11, task, 11)).logits
    longer = model(**batch(rows, 17, task, 20)).logits
    for number, row in enumerate(rows):
        alone = model(**batch([row], len(row), task, len(row))).logits[0]
        for logits in (together, longer):
            found = logits[number] if task == "sequence_classification" else logits[number, : len(row)]
            assert_same(found, alone[: len(found)])


@pytest.mark.parametrize("scheme", ["absmax", "llm_int8"])
@torch.no_grad()
def test_flat_rows_and_rows_padded_on_the_left_are_told_apart(quantized, scheme):
    model, _ = quantized("llama", scheme)
    rows = ragged(3)
    right = model(**batch(rows, 9)).logits
    left = {"input_ids": torch.stack([pad(row, (9 - len(row), 0), value=1) for row in rows])}
    left["attention_mask"] = torch.stack([pad(torch.ones_like(row), (9 - len(row), 0)) for row in rows])
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = model(**left).logits
    for number, row in enumerate(rows):
        assert_same(found[number, 9 - len(row) :], right[number, : len(row)])


@pytest.mark.parametrize("unpad", [True, False], ids=["flat", "padded"])
@pytest.mark.parametrize("scheme", ["absmax", "zeropoint_vector_decomposed", "llm_int8"])
@torch.no_grad()
def test_a_trials_losses_are_those_of_its_rows_one_by_one(quantized, scheme, unpad):
    model, _ = quantized("llama", scheme)
    rows, owner = ragged(4), nn.Identity()
    forward = Forward(model, "causal_lm", unpad)

    def loss(own):
        made = batch(own, max(map(len, own)))
        labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
        return float(forward(made, labels, [BatchSlice(owner, len(own))])[0][0])

    together = loss(rows)
    assert forward.mode.unpadded is unpad
    assert together == pytest.approx(sum(loss([row]) for row in rows), rel=1e-6)


def test_each_sequence_has_a_scale_of_its_own_and_padding_none():
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    x = torch.randn(3, 5, 16)
    x[0] *= 10.0
    x[2, 3:] = 1000.0
    layer = SCHEMES["absmax"].convert(linear)
    layer.sequences._record_shape((3, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]))
    y = layer(x)
    weight = layer.dense(torch.float32)
    for row, length in ((0, 5), (1, 4), (2, 3)):
        own = int8_product.product(x[row, :length], weight, "tensor", False, 0.0, None) + linear.bias
        torch.testing.assert_close(y[row, :length], own)
    assert torch.equal(y[2, 3:], linear.bias.expand(2, 8))


@pytest.mark.parametrize(
    ("shape", "mask", "x", "places"),
    [
        ((2, 4), None, (2, 4), [(0, 4), (4, 8)]),
        ((2, 4), [[1, 1, 0, 0], [1, 1, 1, 1]], (2, 4), [(0, 2), (4, 8)]),
        ((2, 4), [[1, 1, 0, 0], [1, 1, 1, 1]], (8,), [(0, 2), (4, 8)]),
        ((2, 4), [[1, 1, 0, 0], [1, 1, 1, 1]], (2,), [(0, 1), (1, 2)]),
        ((2, 4), [[0, 0, 0, 0], [0, 1, 1, 1]], (2, 4), [(0, 0), (5, 8)]),
        ((2, 1), [[0, 1, 1, 1], [1, 1, 1, 1]], (2, 1), [(0, 1), (1, 2)]),
        ((1, 7), mask_of([3, 4]), (1, 7), [(0, 3), (3, 7)]),
        ((2, 4), None, (2, 6), [(0, 6), (6, 12)]),
        ((2, 4), [[1, 1, 0, 0], [1, 1, 1, 1]], (1, 9), [(0, 9)]),
    ],
)
def test_places(shape, mask, x, places):
    found = Sequences()
    found._record_shape(shape, torch.tensor(mask) if isinstance(mask, list) else mask)
    assert found.of(torch.zeros(*x, 3)) == [slice(*place) for place in places]


def test_a_hole_in_a_mask_is_padding():
    found = Sequences()
    found._record_shape((1, 4), torch.tensor([[1, 0, 1, 1]]))
    assert found.of(torch.zeros(1, 4, 3))[0].tolist() == [0, 2, 3]


def test_a_layer_by_itself_takes_each_matrix_for_a_sequence():
    assert Sequences().of(torch.zeros(3, 5, 2)) == [slice(0, 5), slice(5, 10), slice(10, 15)]
    assert Sequences().of(torch.zeros(5, 2)) == [slice(0, 5)]


@pytest.mark.parametrize("x", [(5,), (2, 3), (4, 2)])
def test_a_folded_batch_is_refused_by_its_shapes(x):
    found = Sequences()
    found._record_shape((2, 4), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))
    with pytest.raises(ConfigError, match=r"sequences.* cannot be told apart; valid: quantization.threshold=0"):
        found.of(torch.zeros(*x, 3))


@torch.no_grad()
def test_generation_of_several_prompts_is_that_of_each(quantized):
    model, _ = quantized("t5", "absmax")
    rows = ragged(3)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    settings["output_logits"] = True
    together = model.generate(**batch(rows, 12), **settings)
    for number, row in enumerate(rows):
        alone = model.generate(**batch([row], len(row)), **settings)
        assert together.sequences[number].tolist() == alone.sequences[0].tolist()
        for one, other in zip(together.logits, alone.logits, strict=True):
            assert_same(one[number], other[0])


def test_only_models_with_such_layers_are_watched(load_base):
    plain, asking = load_base("llama").model, load_base("llama").model
    convert_model(plain, Int8Product())
    convert_model(asking, Int8Product(granularity="tensor"))
    assert not plain._forward_pre_hooks
    assert len(asking._forward_pre_hooks) == 1
    watch(asking)
    assert len(asking._forward_pre_hooks) == 1
