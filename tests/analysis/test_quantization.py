"""A quantization study: what it says of each scheme follows from the weights, and the model comes back as it was."""

import json
import math

import pytest
import torch
from stored import bare
from torch import nn

from loralab.analysis.evaluation import Activations, Evaluation
from loralab.analysis.quantization import SchemeComparison, StudySpec, compare_schemes
from loralab.cli import main
from loralab.config.build import quantizers
from loralab.config.compose import compose
from loralab.errors import ConfigError, DiskError
from loralab.numerics import outliers
from loralab.quantization.base import dense_weight, quantizable
from loralab.quantization.four_bit import FourBit
from loralab.quantization.int8 import Int8Absmax
from loralab.quantization.int8_product import Int8Product
from loralab.quantization.llm_int8 import LLMInt8
from loralab.quantization.none import NoQuantization
from loralab.training.trainer import TrainerSpec

SPEC = StudySpec(schemes={"nf4": {}}, rows=32, shape=[64, 128], inputs="normal")


@pytest.fixture
def subject(load_base):
    model = load_base("llama").model
    return SchemeComparison(SPEC, model, quantizable(model, NoQuantization()))


def test_errors_are_those_of_the_layers_dense_weights(subject):
    quantizer = FourBit()
    row = subject.scheme(quantizer)
    layers = {name: subject.model.get_submodule(name) for name in subject.names}
    weights = {name: dense_weight(layer).double() for name, layer in layers.items()}
    found = {name: quantizer.convert(layer).dense(torch.float32).double() for name, layer in layers.items()}
    error = sum(float((found[name] - weights[name]).square().sum()) for name in layers)
    norm = sum(float(weight.square().sum()) for weight in weights.values())
    assert row["relative_rmse"] == pytest.approx(math.sqrt(error / norm), rel=1e-6)
    assert row["snr_db"] == pytest.approx(-10 * math.log10(error / norm), rel=1e-6)
    assert row["bits_per_parameter"] == 4.5
    assert row["bytes"] * 8 == 4.5 * sum(weight.numel() for weight in weights.values())
    zeroed = sum(int(((found[n] == 0) & (weights[n] != 0)).sum()) for n in layers)
    assert row["zeroed_share"] == zeroed / sum(w.numel() for w in weights.values())
    worst = max(layers, key=lambda n: float((found[n] - weights[n]).norm() / weights[n].norm()))
    assert row["worst_layers"][0]["layer"] == worst
    assert list(row["layers"]) == subject.names


def test_without_quantization_nothing_is_lost(subject):
    row = subject.scheme(NoQuantization())
    assert row["relative_rmse"] == row["matmul_relative_error"] == row["zeroed_share"] == 0.0
    assert row["snr_db"] is None
    assert row["bits_per_parameter"] == 32.0


def test_the_matmul_error_of_a_weight_only_scheme_is_that_of_its_weights(subject):
    row = subject.scheme(Int8Absmax())
    assert row["matmul_relative_error"] == pytest.approx(row["relative_rmse"], rel=0.1)


@pytest.mark.parametrize("quantizer", [LLMInt8(), Int8Product()], ids=["llm_int8", "int8_product"])
def test_the_matmul_error_of_an_int8_product_also_holds_that_of_the_activations(subject, quantizer):
    weight_only, product = subject.scheme(Int8Absmax()), subject.scheme(quantizer)
    assert product["relative_rmse"] == weight_only["relative_rmse"]
    assert product["matmul_relative_error"] > 1.2 * weight_only["matmul_relative_error"]


def test_skipped_layers_are_left_out(subject):
    row = subject.scheme(FourBit(skip_modules=["down_proj"]))
    assert len(row["layers"]) == len(subject.names) - 2
    assert not any("down_proj" in name for name in row["layers"])


def test_the_census_finds_a_planted_outlier(subject):
    name = subject.names[0]
    layer = subject.model.get_submodule(name)
    sigma = outliers.robust_sigma(dense_weight(layer))
    with torch.no_grad():
        layer.weight[:, 3] *= 50
        layer.weight[0, 0] = 200 * sigma
    census = subject.census()
    assert census[name]["max_over_sigma"] > 150
    assert census[name]["loudest_column"] > 20
    assert census[name]["share_over_6_sigma"] > 0
    assert census[subject.names[1]]["loudest_column"] < 3


@pytest.fixture
def evaluation(load_base, make_data, make_model):
    from loralab.data.encoding import encode

    base = load_base("llama")
    encoded = encode(make_data().splits(), base.tokenizer, "causal_lm", 64)
    return Evaluation(base.model, "causal_lm", encoded, 3, base.tokenizer.pad_token_id)


def test_evaluation_compares_a_model_with_its_dense_self(evaluation):
    model = evaluation.model
    names = quantizable(model, NoQuantization())
    weights = {name: layer for name, layer in model.named_modules() if name in names}
    dense = evaluation.reference(names)
    same = evaluation()
    assert same["loss"] == pytest.approx(dense["loss"])
    assert (same["loss_change"], same["kl"], same["same_prediction"]) == (0.0, 0.0, 1.0)
    row = SchemeComparison(SPEC, model, names).scheme(FourBit(quant_type="int4", granularity="tensor"), evaluation)
    assert row["kl"] > 1e-4
    assert row["loss"] == pytest.approx(dense["loss"] + row["loss_change"])
    assert row["loss_change_se"] > 0
    assert row["same_prediction"] < 1.0
    assert {name: layer for name, layer in model.named_modules() if name in names} == weights  # put back


def test_kl_is_that_of_the_distributions(evaluation):
    evaluation.reference([])
    before = [logs.clone() for logs in evaluation.dense]
    with torch.no_grad():
        evaluation.model.lm_head.weight *= 1.5
    after = [logits.log_softmax(-1) for logits, _ in evaluation.batches()]
    expected = nn.functional.kl_div(torch.cat(after), torch.cat(before), reduction="sum", log_target=True)
    assert evaluation()["kl"] == pytest.approx(float(expected) / sum(map(len, after)), rel=1e-4)


def test_activations_count_positions_by_feature():
    layer = nn.Linear(4, 2)
    with Activations(nn.Sequential(layer), ["0"]) as seen:
        layer(torch.tensor([[[7.0, 0.0, -6.0, 5.9], [7.0, 6.1, 0.0, 0.0]]]))
    assert seen.share()["0"].tolist() == [1.0, 0.5, 0.5, 0.0]
    assert not layer._forward_pre_hooks


def test_a_scheme_that_does_not_fit_says_why_and_stops_no_other(make_model, make_data):
    schemes = {"nf4": FourBit(), "too large": FourBit(block_size=4096), "int8": Int8Absmax()}
    rest = (make_model(config={"hidden_size": 32}), make_data(), TrainerSpec("cpu"), False)
    found = compare_schemes(SPEC, schemes, *rest)
    assert "block_size = 4096 is larger than model.layers.0.self_attn.q_proj" in found["schemes"]["too large"]["error"]
    assert found["schemes"]["nf4"]["bits_per_parameter"] == 4.5
    with pytest.raises(ConfigError, match="block_size = 4096"):
        compare_schemes(SPEC, {"too large": schemes["too large"]}, *rest)


def test_a_scheme_that_skips_every_layer_says_so(subject):
    with pytest.raises(ConfigError, match=r"skip_modules=\['\.\*'\] leaves no layer to quantize"):
        subject.scheme(FourBit(skip_modules=[".*"]))


@pytest.mark.parametrize("kind", outliers.SYNTHETIC)
def test_synthetic_weights_need_no_model(kind, make_data):
    spec = StudySpec(schemes={"nf4": {}}, weights=kind, rows=16, shape=[64, 128], inputs="normal")
    found = compare_schemes(spec, {"nf4": FourBit()}, None, make_data(), TrainerSpec("cpu"), False)
    row = found["schemes"]["nf4"]
    # x is independent of the weights: the error of the product is that of the weights
    assert row["matmul_relative_error"] == pytest.approx(row["relative_rmse"], rel=0.35)
    assert found["layers"][kind]["shape"] == [64, 128]


def test_every_scheme_of_the_configuration_builds_and_is_a_scheme_of_its_own():
    stored_trial = quantizers(compose([], "quantize"))
    assert {"none", "int8_absmax", "int8_zeropoint", "int8_blockwise", "llm_int8", "int4_absmax", "nf4"} <= set(
        stored_trial
    )
    assert len({repr(spec) for spec in stored_trial.values()}) == len(stored_trial)


def test_quantization_on_the_command_line_is_studied_alone():
    stored_trial = quantizers(compose(["quantization=nf4", "quantization.block_size=32"], "quantize"))
    assert [spec.block_size for spec in stored_trial.values()] == [32]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["study.weights=cauchy"], "study.weights='cauchy' is unknown"),
        (["study.shape=[64]"], "study.shape must be two numbers of at least 8: (out, in), got [64]"),
        (["study.shape=[4,64]"], "study.shape.0 must be at least 8, got 4"),
        (["study.rows=0"], "study.rows must be at least 1, got 0"),
        (["study.inputs=uniform"], "study.inputs='uniform' is unknown"),
        (["study.inputs=captured"], "study.inputs=captured needs --evaluate"),
        (["+study.schemes.nf5={}"], "study.schemes.nf5.option='nf5' is unknown; did you mean nf4?"),
        (
            ["+study.schemes.nf4.blok=32"],
            "study.schemes.nf4.blok is not an option of FourBit; did you mean block_size?",
        ),
        (["--evaluate", "study.weights=gauss"], "--evaluate needs a model"),
        (["quantization=nf5"], "did you mean nf4?"),
    ],
)
def test_wrong_words_are_exit_2(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.run(["quantize", *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_command_prints_one_json_object_and_writes_a_page(tiny_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    left = ("adapter.", "callbacks", "trainer.max_steps", "plan.")
    words = [word for word in tiny_arguments if not word.startswith(left)]
    few = "study.schemes={nf4: {}, nf4_double: {}, int8_absmax: {}, nf4_4096: {option: nf4, block_size: 4096}}"
    schemes = ["~study.schemes", f"+{few}"]
    assert main.run(["quantize", "--json", *words, *schemes, "--evaluate", "study.rows=8", "hydra.run.dir=q"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert found["schemes"]["nf4"]["bits_per_parameter"] == 4.5
    shapes = [layer["shape"] for layer in found["layers"].values()]
    bits = sum(FourBit(double_quant=True).storage_bits(*shape) for shape in shapes)
    assert found["schemes"]["nf4_double"]["bits_per_parameter"] == bits / sum(a * b for a, b in shapes)
    assert {"kl", "loss", "loss_change"} <= found["schemes"]["nf4"].keys()
    assert json.loads((tmp_path / "q" / "quantize.json").read_text())["schemes"] == found["schemes"]
    page = (tmp_path / "q" / "report" / "index.html").read_text()
    assert "Loss change against bits" in page
    assert "http" not in bare(page).replace("http://www.w3.org", "")
    assert (tmp_path / "q" / "report" / "figures" / "loss_change_against_bits.svg").is_file()


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr(
        "loralab.analysis.quantization.compare_schemes", lambda *given: pytest.fail("the study has begun")
    )
    assert main.run(["quantize", "study.weights=gauss", f"hydra.run.dir={tmp_path / 'taken' / 'q'}"]) == 7
    assert "taken/q cannot be written" in capsys.readouterr().err


def test_the_table_is_shown_also_where_the_disk_takes_no_more(tmp_path, monkeypatch, capsys):
    def full(folder, result):
        raise DiskError(f"{folder} is full")

    monkeypatch.setattr("loralab.reporting.quantization.write", full)
    words = ["study.weights=gauss", "study.shape=[64,64]", "quantization=nf4", "logger=none"]
    assert main.run(["quantize", *words, f"hydra.run.dir={tmp_path / 'q'}"]) == 7
    told = capsys.readouterr()
    assert "nf4" in told.out
    assert "is full" in told.err
