"""The page, the table and the W&B rows of a quantization study."""

import re

import pytest

from loralab.reporting import quantization
from loralab.reporting.quantization_figures import family, figures


def row(bits, rmse, **more):
    return {
        **{"bits_per_parameter": bits, "bytes": 1000, "weights": 2000, "relative_rmse": rmse, "zeroed_share": 0.1},
        **{"snr_db": 20.0 if rmse else None, "bulk_relative_rmse": rmse, "matmul_relative_error": rmse},
        **{"largest_error": 0.1, "worst_layers": [{"layer": "a.b", "relative_rmse": rmse}]},
        **{"layers": {"a.b": rmse, "a.c": rmse / 2}},
        **more,
    }


@pytest.fixture
def result():
    evaluated = {"loss": 2.0, "loss_change": 0.03, "loss_change_se": 0.01, "kl": 0.02, "same_prediction": 0.9}
    layer = {"shape": [4, 8], "sigma": 0.02, "max_over_sigma": 5.0, "kurtosis": 3.0}
    return {
        "weights": "some/<model>",
        "fingerprint": "0123456789abcdef",
        "data": {"name": "samples", "fingerprint": "fedcba", "rows": 3, "targets": 60},
        "dense": {"loss": 1.97},
        "outlier_features": [3, 5],
        "schemes": {
            "none": row(32.0, 0.0, **{**evaluated, "loss_change": 0.0, "loss_change_se": 0.0}),
            "nf4": row(4.5, 0.09, **evaluated),
            "int8_absmax": row(8.01, 0.01, **evaluated),
            "huge_blocks": {"error": "quantization.block_size = 4096 is larger than a.b"},
        },
        "layers": {"a.b": layer, "a.c": layer},
    }


def page_of(result):
    return quantization.page(result, list(figures(quantization.fitting(result), list(result["layers"]))))


def test_the_terminal_shows_every_scheme_and_why_one_is_left_out(result):
    text = quantization.terminal(result)
    assert re.search(r"nf4 +4\.5000 .*9\.00% .*\+0\.0300 \+- 0\.0100", text)
    assert "huge_blocks: quantization.block_size = 4096" in text
    assert "scored on 60 targets of samples" in text


def test_the_page_is_whole_escaped_and_shows_code_books(result):
    page = page_of(result)
    assert "some/&lt;model&gt;" in page
    assert "<model>" not in page
    for title in ("Precision against bits", "Loss change against bits", "Code books", "Error by layer"):
        assert title in page
    assert "huge_blocks is left out" in page
    assert page.count("<figure data-figure=") >= 4


def test_weights_alone_have_no_loss_columns(result):
    for scheme in result["schemes"].values():
        for key in ("loss", "loss_change", "loss_change_se", "kl", "same_prediction"):
            scheme.pop(key, None)
    del result["data"], result["dense"], result["outlier_features"]
    assert "Loss change" not in page_of(result)
    assert "loss" not in quantization.terminal(result)


def test_the_wandb_table_has_a_row_for_every_measured_scheme(result):
    columns, rows = quantization.wandb_table(result)
    assert columns[:2] == ["scheme", "bits_per_parameter"]
    assert [one[0] for one in rows] == ["none", "nf4", "int8_absmax"]
    assert all(len(one) == len(columns) for one in rows)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("int8_blockwise", "int8 weight-only"),
        ("llm_int8", "int8 weights and activations"),
        ("int8_product_absmax", "int8 weights and activations"),
        ("fp4_e2m1", "fp4"),
        ("nvfp4", "fp4"),
        ("nf4_32_double", "nf4"),
        ("int4_absmax_row", "int4"),
    ],
)
def test_a_scheme_belongs_to_the_family_of_its_name(name, kind):
    assert family(name) == kind
