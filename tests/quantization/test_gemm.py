"""A faster product is taken only where it is as exact, clearly faster, and treats rows alike."""

import pytest
import torch
import torch.nn.functional as F

from loralab.quantization import gemm


@pytest.fixture(autouse=True)
def probed_anew():
    gemm.chosen.cache_clear()
    yield
    gemm.chosen.cache_clear()


@pytest.fixture
def choose(monkeypatch):
    def to(name):
        monkeypatch.setattr(gemm, "product_library", lambda: name)

    return to


def clock(monkeypatch, ours, theirs):
    seconds = iter([ours, theirs] * len(gemm.SHAPES))
    monkeypatch.setattr(gemm, "_seconds", lambda _: next(seconds))


@pytest.mark.parametrize(("ours", "theirs", "name"), [(1.0, 2.1, "onednn"), (1.0, 1.2, "torch"), (2.0, 1.0, "torch")])
def test_the_faster_is_taken_where_it_is_clearly_faster(monkeypatch, ours, theirs, name):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    clock(monkeypatch, ours, theirs)
    assert gemm.product_library() == name


def test_a_product_of_lower_precision_is_never_taken(monkeypatch):
    clock(monkeypatch, 1.0, 9.0)
    monkeypatch.setattr(gemm, "_onednn", lambda x, w, b: F.linear(x.bfloat16(), w.bfloat16()).float())
    assert gemm.product_library() == "torch"


def test_nor_one_whose_rows_hang_on_each_other(monkeypatch):
    clock(monkeypatch, 1.0, 9.0)
    monkeypatch.setattr(gemm, "_onednn", lambda x, w, b: F.linear(x, w) * (1 + 1e-7 * (len(x) % 3)))
    assert gemm.product_library() == "torch"


@pytest.mark.parametrize("name", ["torch", "onednn"])
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_both_give_the_product(choose, name, shape):
    choose(name)
    x, weight, bias = torch.randn(*shape, 8), torch.randn(6, 8), torch.randn(6)
    torch.testing.assert_close(gemm.linear(x, weight, bias), x @ weight.t() + bias)
    torch.testing.assert_close(gemm.backward(x @ weight.t(), weight), (x @ weight.t()) @ weight)


def test_half_and_double_precision_are_torchs(choose, monkeypatch):
    choose("onednn")
    monkeypatch.delattr(gemm, "_onednn")
    for dtype in (torch.bfloat16, torch.float64):
        x, weight = torch.randn(4, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype)
        assert torch.equal(gemm.linear(x, weight, None), F.linear(x, weight))
