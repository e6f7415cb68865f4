"""Studies of odd weights: what is undefined is null and says why, and everything else is there; figures by numpy."""

import json
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loralab.analysis.evaluation import Evaluation
from loralab.analysis.quantization import INPUTS, SchemeComparison, StudySpec
from loralab.cli import main
from loralab.data.encoding import encode
from loralab.errors import ConfigError
from loralab.numerics import outliers
from loralab.quantization.base import quantizable
from loralab.quantization.four_bit import FourBit
from loralab.quantization.int8 import Int8Absmax, Int8ZeroPoint
from loralab.quantization.int8_blockwise import Int8Blockwise
from loralab.quantization.int8_product import Int8Product
from loralab.quantization.llm_int8 import LLMInt8
from loralab.quantization.none import NoQuantization
from loralab.reporting import quantization
from loralab.reporting.quantization_figures import figures

QUARTILE = NormalDist().inv_cdf(0.75)
SCHEMES = {
    "none": NoQuantization(),
    "int8_absmax": Int8Absmax(),
    "int8_zeropoint_tensor": Int8ZeroPoint(granularity="tensor"),
    "llm_int8": LLMInt8(),
    "int8_product_absmax": Int8Product(granularity="tensor"),
    "int8_product_zeropoint_vector_decomposed": Int8Product(zero_point=True, threshold=6.0),
    "int4_absmax_row": FourBit(quant_type="int4", granularity="row"),
}
BLOCKS = {
    "int8_blockwise": Int8Blockwise(block_size=64),
    "fp4_double": FourBit(quant_type="fp4", block_size=32, double_quant=True),
    "nf4": FourBit(block_size=32),
    "fp4_e3m0": FourBit(quant_type="e3m0", block_size=32),
}


def normal(rows, columns, seed=0):
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def study_of(*weights, dtype=torch.float32, conv=False, rows=16):
    """A study of layers l0, l1, ... with these weights (out, in)."""
    layers = {}
    for number, weight in enumerate(weights):
        layer = Conv1D(*weight.shape) if conv else nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter((weight.t().contiguous() if conv else weight.clone()).to(dtype), False)
        layers[f"l{number}"] = layer
    return SchemeComparison(StudySpec(schemes={"nf4": {}}, rows=rows), nn.ModuleDict(layers), list(layers))


def shown(study, schemes):
    """The whole result, after it went through JSON, terminal, page and W&B table."""
    rows = {name: study.scheme(spec) for name, spec in schemes.items()}
    result = {"weights": "odd", "schemes": rows, "layers": study.census()}
    result["inputs"] = {"kind": "outlier_features", "of": INPUTS["outlier_features"].format(rows=16)}
    text = json.dumps(result, allow_nan=False)
    drawn = list(figures(quantization.fitting(result), list(result["layers"])))
    assert quantization.page(result, drawn).count("<figure data-figure=") == len(drawn) > 0
    assert len(quantization.wandb_table(result)[1]) == len(schemes)
    return json.loads(text), quantization.terminal(result)


ODD = {
    "zeros": torch.zeros(8, 64),
    "2e-38": normal(8, 64) / 0.02 * 2e-38,
    "2e18": normal(8, 64) / 0.02 * 2e18,
    "3e38": torch.full((8, 64), 3e38) * (1 - 2 * (torch.arange(64) % 2)),
    "1e-44": torch.full((8, 64), 1e-44),
    "constant": torch.full((8, 64), 0.5),
    "sparse": torch.where(torch.rand(8, 64, generator=torch.Generator().manual_seed(1)) < 0.7, 0.0, normal(8, 64)),
    "half of the columns": torch.where(torch.arange(64) < 40, 0.0, normal(8, 64)),
    "one weight": torch.full((1, 1), 0.3),
    "one zero": torch.zeros(1, 1),
    "one column": normal(64, 1),
    "one row": normal(1, 64),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_weights_have_a_table_and_a_page_and_words_for_what_is_undefined(kind):
    weight = ODD[kind]
    schemes = {**SCHEMES, **(BLOCKS if weight.numel() >= 64 else {})}
    result, text = shown(study_of(weight), schemes)
    for name, row in result["schemes"].items():
        assert name in text
        missing = {key for key, value in row.items() if value is None}
        missing |= {"layers"} if None in row["layers"].values() else set()
        assert missing == set(row.get("undefined", {})), name
        if not bool(weight.any()):
            assert row["relative_rmse"] is None
            assert row["undefined"]["relative_rmse"] == "every weight is 0"
    (layer,) = result["layers"].values()
    assert {key for key, value in layer.items() if value is None} == set(layer.get("undefined", {}))


def test_a_layer_of_zeros_hides_no_other_layer():
    result, text = shown(study_of(torch.zeros(8, 64), normal(8, 64)), SCHEMES | BLOCKS)
    alone, _ = shown(study_of(normal(8, 64)), SCHEMES | BLOCKS)
    for name, row in result["schemes"].items():
        assert row["relative_rmse"] == alone["schemes"][name]["relative_rmse"]
        assert row["layers"] == {"l0": None, "l1": alone["schemes"][name]["layers"]["l0"]}
    assert result["layers"]["l0"]["undefined"]["sigma"] == "every weight is 0"
    assert "some layers: every weight is 0, or not finite when dequantized: l0 (all of them)" in text


def test_the_sigma_of_a_sparse_layer_is_that_of_the_weights_it_has():
    weight = normal(256, 256)
    sparse = torch.where(torch.rand(256, 256, generator=torch.Generator().manual_seed(1)) < 0.7, 0.0, weight)
    found = outliers.census(sparse)
    assert found["sigma"] == pytest.approx(0.02, rel=0.02)
    assert found["zero_share"] == pytest.approx(0.7, abs=0.01)
    assert outliers.robust_sigma(torch.zeros(4, 4)) is None


@pytest.mark.parametrize("shape", [(37, 50), (5, 2), (1, 7)])
def test_the_census_is_numpys(shape):
    weight = normal(*shape, seed=4)
    weight[0, 0] = 1.0
    found, w = outliers.census(weight), weight.numpy().astype(np.float64)
    sigma = np.median(np.abs(w)) / QUARTILE
    assert found["sigma"] == pytest.approx(sigma, rel=1e-6)
    assert found["max_over_sigma"] == pytest.approx(1.0 / sigma, rel=1e-6)
    assert found["share_over_6_sigma"] == pytest.approx(np.mean(np.abs(w) > 6 * sigma))
    assert found["kurtosis"] == pytest.approx(np.mean(w**4) / np.mean(w**2) ** 2, rel=1e-6)
    columns = np.sqrt(np.mean(w**2, axis=0))
    assert found["loudest_column"] == pytest.approx(columns.max() / np.median(columns), rel=1e-6)


def by_numpy(weight, spec):
    """What the codes of a scheme stand for, its bytes, and its product with x, from the formulas alone."""
    w, (rows, width) = weight.astype(np.float64), weight.shape
    if isinstance(spec, Int8Absmax) and not isinstance(spec, Int8ZeroPoint):
        scale = np.abs(w).max(axis=1, keepdims=True) / 127
        return np.round(w / scale) * scale, rows * width + 4 * rows
    levels = np.arange(-7, 8) / 7
    blocks = np.pad(w.reshape(-1), (0, -w.size % spec.block_size)).reshape(-1, spec.block_size)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = levels[np.abs(blocks[..., None] / absmax[..., None] - levels).argmin(axis=-1)]
    return (nearest * absmax).reshape(-1)[: w.size].reshape(rows, width), math.ceil(w.size / 2) + 4 * len(blocks)


@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [Int8Absmax(), FourBit(quant_type="int4", block_size=64)], ids=lambda one: one.name)
def test_every_figure_of_the_weights_is_numpys(spec, dtype, conv):
    weights = [normal(24, 80, 1).to(dtype), normal(7, 33, 2).to(dtype)]  # blocks run over the ends of rows
    row = study_of(*weights, dtype=dtype, conv=conv).scheme(spec)
    dense = [w.double().numpy() for w in weights]
    back, stored = zip(*(by_numpy(w, spec) for w in dense), strict=True)
    off = [b - w for b, w in zip(back, dense, strict=True)]
    n = sum(w.size for w in dense)
    relative = math.sqrt(sum((o**2).sum() for o in off) / sum((w**2).sum() for w in dense))
    assert row["bits_per_parameter"] == 8 * sum(stored) / n
    assert row["relative_rmse"] == pytest.approx(relative, rel=1e-5)
    assert row["snr_db"] == pytest.approx(-20 * math.log10(relative), rel=1e-6)
    assert row["zeroed_share"] == sum(((b == 0) & (w != 0)).sum() for b, w in zip(back, dense, strict=True)) / n
    assert row["largest_error"] == pytest.approx(max(np.abs(o).max() for o in off), rel=1e-5)
    inside = [np.abs(w) < 3 * np.median(np.abs(w)) / QUARTILE for w in dense]
    bulk = [sum((a[i] ** 2).sum() for a, i in zip(arrays, inside, strict=True)) for arrays in (off, dense)]
    assert row["bulk_relative_rmse"] == pytest.approx(math.sqrt(bulk[0] / bulk[1]), rel=1e-5)
    for name, o, w in zip(("l0", "l1"), off, dense, strict=True):
        assert row["layers"][name] == pytest.approx(np.linalg.norm(o) / np.linalg.norm(w), rel=1e-5)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16.0), (torch.float32, 32.0)])
def test_unquantized_layers_have_the_bits_of_their_dtype_even_as_views(dtype, bits):
    study = study_of(normal(8, 64), dtype=dtype)
    both = torch.zeros(16, 64, dtype=dtype)
    study.model["l0"].weight = nn.Parameter(both[:8] + 0.01, False)
    study.model["l0"].weight.data = both[:8]
    assert study.scheme(NoQuantization())["bits_per_parameter"] == bits


def test_activations_have_the_outlier_features_of_the_paper():
    x = outliers.activations(512, 4096, torch.Generator().manual_seed(0))
    loud = (x.abs() >= 6.0).double().mean(dim=0)
    features = loud.nonzero().flatten()
    assert len(features) == 6
    assert float(loud[features].mean()) == pytest.approx(0.75, abs=0.03)
    assert 50 < float(x.abs().max()) <= 60
    for feature in features:
        values = x[:, feature][x[:, feature].abs() >= 6.0]
        assert float(values.sign().mean().abs()) == 1.0
    assert int((outliers.activations(64, 3, torch.Generator().manual_seed(0)).abs() >= 6).any(dim=0).sum()) == 1


def test_decomposition_shows_in_the_matmul_error():
    study = study_of(outliers.gauss((64, 256), torch.Generator().manual_seed(0)), rows=64)
    plain, decomposed, weight_only = (
        study.scheme(spec)["matmul_relative_error"]
        for spec in (Int8Product(), Int8Product(threshold=6.0), Int8Absmax())
    )
    assert decomposed < 0.4 * plain
    assert decomposed < weight_only  # its outlier columns of W are in 16 bits


@pytest.fixture
def ragged(load_base, make_data):
    """An evaluation of rows of unequal lengths, ``batch_size`` to be chosen."""

    def make(batch_size, family="llama"):
        torch.manual_seed(5)
        base = load_base(family)
        base.model.double()
        data = make_data("labels" if base.spec.task == "sequence_classification" else "ragged")
        encoded = encode(data.splits(), base.tokenizer, base.spec.task, 64)
        return Evaluation(base.model, base.spec.task, encoded, batch_size, base.tokenizer.pad_token_id)

    return make


def by_rows(evaluation, quantize):
    """Mean loss with every linear layer's input through ``quantize``, row by row, without any padding."""
    model, total, count = evaluation.model, 0.0, 0
    names = quantizable(model, NoQuantization())
    hooks = []
    for name in names:
        layer = model.get_submodule(name)
        layer.weight.data = quantize(layer.weight.data)
        hooks.append(layer.register_forward_pre_hook(lambda _, given: (quantize(given[0]),)))
    rows = evaluation.data.validation
    for index in range(len(rows)):
        ids, labels = (torch.tensor([own]) for own in (rows[index].input_ids, rows[index].labels))
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        for log, label in zip(logs, labels[0, 1:].tolist(), strict=True):
            if label != -100:
                total, count = total - float(log[label]), count + 1
    for hook in hooks:
        hook.remove()
    return total / count


def test_the_loss_of_an_int8_product_is_the_same_at_every_batch_size(ragged):
    losses = []
    for batch_size in (1, 2, 3):
        evaluation = ragged(batch_size)
        names = quantizable(evaluation.model, NoQuantization())
        evaluation.reference(names)
        losses.append(
            SchemeComparison(StudySpec(schemes={"x": {}}), evaluation.model, names).scheme(
                Int8Product(granularity="tensor"), evaluation
            )["loss"]
        )

    def through_int8(x):
        scale = x.abs().max() / 127
        return (x / scale).round() * scale

    expected = by_rows(ragged(1), through_int8)
    assert losses == [pytest.approx(expected, rel=2e-6)] * 3


@pytest.mark.parametrize("family", ["gpt2", "t5", "distilbert"])
def test_captured_inputs_and_losses_of_every_task_do_not_depend_on_the_batch_size(ragged, family):
    rows = []
    for batch_size in (1, 3):
        evaluation = ragged(batch_size, family)
        names = quantizable(evaluation.model, NoQuantization())
        evaluation.reference(names, keep=30)
        subject = SchemeComparison(StudySpec(schemes={"x": {}}), evaluation.model, names)
        subject.captured = evaluation.inputs
        rows.append(subject.scheme(LLMInt8(threshold=1.0), evaluation))
        assert set(evaluation.inputs) == set(names)
    for key in ("loss", "loss_change", "kl", "matmul_relative_error"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4, abs=1e-7)


def test_outlier_features_and_captured_inputs_are_of_tokens_alone(ragged):
    found = []
    for batch_size in (1, 3):
        evaluation = ragged(batch_size)
        evaluation.reference(["model.layers.0.self_attn.q_proj"], keep=20)
        (inputs,) = evaluation.inputs.values()
        found.append(torch.cat(inputs))
        lengths = [len(evaluation.data.validation[i].input_ids) for i in range(len(inputs))]
        assert [len(x) for x in inputs] == [*lengths[:-1], 20 - sum(lengths[:-1])]
    torch.testing.assert_close(*found)


def test_a_single_target_and_masked_vocabularies_have_finite_or_null_figures(ragged):
    evaluation = ragged(2)
    evaluation.reference([])
    evaluation.dense = [logs.clone() for logs in evaluation.dense]
    for logs in evaluation.dense:
        logs[:, 7] = -torch.inf  # a token that the model rules out
    assert math.isfinite(evaluation()["kl"])
    evaluation.dense[0][0, :] = torch.nan
    row = evaluation()
    assert row["kl"] is None
    assert row["undefined"] == {"kl": "not a number"}
    one = ragged(1)
    one.batches = lambda: iter([(torch.zeros(1, 5), torch.tensor([2]))])
    assert one.reference([]) == {"loss": pytest.approx(math.log(5))}
    row = one()
    assert (row["loss_change"], row["loss_change_se"]) == (0.0, None)
    assert row["undefined"] == {"loss_change_se": "one target"}
    json.dumps(row, allow_nan=False)


def test_the_standard_error_is_numpys(ragged):
    evaluation = ragged(2)
    names = quantizable(evaluation.model, NoQuantization())
    evaluation.reference(names)
    row = SchemeComparison(StudySpec(schemes={"x": {}}), evaluation.model, names).scheme(FourBit(), evaluation)
    changed = ragged(2)
    for name in names:
        layer = changed.model.get_submodule(name)
        layer.weight.data = FourBit().convert(layer).dense(torch.float64)
    change = []
    for (before, targets), (after, _) in zip(ragged(2).batches(), changed.batches(), strict=True):
        change += (before.log_softmax(-1) - after.log_softmax(-1)).gather(1, targets[:, None])[:, 0].tolist()
    assert row["loss_change"] == pytest.approx(np.mean(change), rel=1e-3)
    assert row["loss_change_se"] == pytest.approx(np.std(change, ddof=1) / math.sqrt(len(change)), rel=1e-3)


def test_the_command_names_its_inputs_and_survives_a_layer_of_zeros(tiny_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load = SchemeComparison.__init__

    def with_zeros(self, spec, model, names, **more):
        model.get_submodule(names[0]).weight.data.zero_()
        load(self, spec, model, names, **more)

    monkeypatch.setattr(SchemeComparison, "__init__", with_zeros)
    left = ("adapter.", "callbacks", "trainer.max_steps", "plan.")
    words = [word for word in tiny_arguments if not word.startswith(left)]
    words += ["quantization=nf4", "study.rows=8", "hydra.run.dir=q"]
    for more, kind in (([], "outlier_features"), (["--evaluate"], "captured")):
        assert main.run(["quantize", "--json", *words, *more]) == 0
        found = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(word))
        assert found["inputs"]["kind"] == kind
        assert next(iter(found["schemes"]["nf4"]["layers"].values())) is None
        assert found["schemes"]["nf4"]["matmul_relative_error"] > 0.01
        assert found["inputs"]["of"] in (tmp_path / "q" / "report" / "index.html").read_text()


def test_a_model_without_linear_layers_is_refused(make_model, make_data, monkeypatch):
    from loralab.analysis import quantization as module
    from loralab.training.trainer import TrainerSpec

    monkeypatch.setattr(module, "quantizable", lambda *_: [])
    with pytest.raises(ConfigError, match="has no linear layer inside its base model"):
        module.compare_schemes(
            StudySpec(schemes={"nf4": {}}), {"nf4": FourBit()}, make_model(), make_data(), TrainerSpec("cpu"), False
        )
