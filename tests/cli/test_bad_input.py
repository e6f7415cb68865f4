"""Every wrong input gets one clear paragraph and the right exit code."""

import builtins
import json
import os

import pytest
import torch

from loralab.cli import main
from loralab.models import loading, pretrained
from loralab.quantization.none import NoQuantization
from loralab.records import record


@pytest.fixture
def refuse(tiny_arguments, tmp_path, monkeypatch, capsys):
    """Runs ``train`` and returns (exit code, what was said); an error must not be a traceback or many lines."""
    monkeypatch.chdir(tmp_path)

    def run(*words, command="train"):
        given = {word.lstrip("+").split("=")[0] for word in words}
        kept = [word for word in tiny_arguments if word.lstrip("+").split("=")[0] not in given]
        code = main.run([command, *kept, *words])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return code, said

    return run


CONFIGURATION = {
    "unknown key": (["adapter.lora_alhpa=8"], "did you mean lora_alpha?"),
    "unknown key added": (["+adapter.rnak=8"], "adapter.rnak is not an option of LoRA"),
    "unknown option": (["quantization=nf5"], "did you mean nf4?"),
    "unknown group": (["quantisation=nf4"], "did you mean quantization?"),
    "wrong type": (["adapter.r=eight"], "adapter.r must be a whole number, got 'eight'"),
    "no equals sign": (["adapter.r"], "adapter.r"),
    "rank zero": (["adapter.r=0"], "adapter.r must be at least 1, got 0"),
    "negative alpha": (["adapter.lora_alpha=-1"], "adapter.lora_alpha must be a positive number"),
    "alpha nan": (["adapter.lora_alpha=nan"], "adapter.lora_alpha must be a positive number, got nan"),
    "dropout": (["adapter.lora_dropout=1.5"], "adapter.lora_dropout must be a number in [0, 1), got 1.5"),
    "targets": (["adapter.target_modules=[q_prj]"], "did you mean q_proj? there are: embed_tokens (x1), q_proj (x2)"),
    "target regex": (["adapter.target_modules='q_('"], "not a valid regular expression"),
    "target regex nested": (
        ["adapter.target_modules='(.*)*(.*)*(.*)*x'"],
        "'(.*)*(.*)*(.*)*x' matches no linear layer",
    ),
    "skip regex without end": (
        ["quantization=nf4", "quantization.skip_modules=['(.*)*(.*)*(.*)*x']"],
        "matches no linear",
    ),
    "embedding": (["adapter.target_modules=[embed_tokens]", "adapter.use_dora=true"], "is of type Embedding"),
    "no experts": (["adapter.target_parameters=[down_proj]"], "it has none of three dimensions; valid: null"),
    "experts with dropout": (
        ["adapter.target_parameters=[down_proj]", "adapter.lora_dropout=0.1"],
        "adapter.lora_dropout=0.1 does not go with adapter.target_parameters",
    ),
    "learning rate": (["optimizer.lr=nan"], "optimizer.lr must be a positive number"),
    "betas": (["optimizer.betas=[0.9]"], "optimizer.betas"),
    "warm-up twice": (["schedule.warmup_steps=2", "schedule.warmup_ratio=0.1"], "exclude each other"),
    "steps": (["trainer.max_steps=-1"], "trainer.max_steps must be at least 0"),
    "precision": (["trainer.precision=bf17"], "trainer.precision='bf17'"),
    "batch": (["data.batch_size=0"], "data.batch_size must be at least 1"),
    "block size": (["quantization=nf4", "quantization.block_size=48"], "quantization.block_size"),
    "double int8": (["quantization=int8_absmax", "+quantization.double_quant=true"], "quantization.double_quant"),
    "skip": (["quantization=nf4", "quantization.skip_modules=[q_prj]"], "quantization.skip_modules"),
    "key of another method": (["adapter=full", "quantization=nf4"], "adapter.r is not an option: Full has none"),
    "seed": (["seed=-1"], "seed must be"),
    "metric mode": (["metric_mode=lower"], "metric_mode must be min or max"),
    "model folder": (["model.name_or_path=./nowhere"], "model.name_or_path"),
    "architecture": (["+model.config.model_type=lama"], "did you mean llama?"),
    "architecture key": (["+model.config.hiden_size=64"], "did you mean hidden_size?"),
    "task": (["model.task=translation"], "model.task='translation'"),
    "window": (["model.max_length=100000"], "exceeds the"),
    "unknown top key": (["+foo=1"], "foo is not an option"),
    "part taken away": (["~schedule"], "schedule is missing"),
    "part null": (["adapter=null"], "a group was set to null or a number"),
    "sweep is a word": (["sweep=abc"], "sweep='abc' is no group of settings"),
    "callback key": (
        ["callbacks=default", "callbacks.progress.seconds=abc"],
        "callbacks.progress.seconds must be a number of at least 0, got 'abc'",
    ),
    "callback class": (["+callbacks.foo._target_=os.getcwd"], "is not a Lightning callback"),
    "half precision": (["trainer.precision=16-mixed"], "trainer.precision=16-mixed needs a GPU"),
    "flag": (["--cgf", "job"], "loralab has no flag '--cgf'"),
    "flag of another command": (["--resume", "x"], "loralab train has no --resume; valid: loralab sweep"),
    "interpolation": (["adapter.r=${nowhere}"], "nowhere"),
    "two equals signs": (["adapter.r==4"], "adapter.r==4 is not understood: one = stands between key and value; valid"),
    "open bracket": (["adapter.rank_pattern={q: 2"], "a bracket or a quote has no counterpart"),
    "grammar": (["optimizer.lr=1e-3,,1"], "'1e-3,,1' is no value of Hydra's grammar; valid: a number"),
    "nothing to take away": (["~optimizer.mode"], "~optimizer.mode takes away what is not there; valid: a key that"),
    "dots": (["adapter..r=2"], "'adapter..r=2' is not understood; valid: key=value"),
    "no key": (["=2"], "'=2' is not understood; settings are key=value"),
    "several values": (["adapter.r=2,4"], "adapter.r=2,4 holds several values, and this is one run; valid: "),
    "package alone": (["-p", "adapter"], "there is no --cfg; valid: --cfg job --package adapter"),
    "resolve alone": (["--resolve"], "there is no --cfg; valid: --cfg job --resolve"),
    "package": (["--cfg", "job", "-p", "adaptr"], "package 'adaptr' not found"),
    "seed empty": (["seed="], "seed must be a whole number of at least 0, got ''"),
    "seed true": (["seed=true"], "seed must be a whole number of at least 0, got True"),
    "switch": (["model.gradient_checkpointing=-1"], "model.gradient_checkpointing must be true or false, got -1"),
    "rank beyond int": (
        ["adapter.r=99999999999999999999"],
        "adapter.r must be a whole number from 1 to 2147483647, got 99",
    ),
    "draw beyond int": (["model.draw=99999999999999999999"], "model.draw must be a whole number from 0"),
    "steps beyond int": (
        ["trainer.max_steps=99999999999999999999"],
        "trainer.max_steps must be a whole number from 0 to 2147483647, got 99999999999999999999",
    ),
    "micro-batches": (
        ["trainer.accumulate_grad_batches=99999999999"],
        "must be a whole number from 1 to 2147483647, got 99999999999",
    ),
    "batch beyond memory": (
        ["data.batch_size=9999999"],
        "data.batch_size must be a whole number from 1 to 1048576, got 9999999",
    ),
    "epsilon": (["optimizer.eps=1e400"], "optimizer.eps must be a positive number, got inf"),
    "spikes": (
        ["callbacks=default", "callbacks.memory.spike_floor_mib=1e400"],
        "spike_floor_mib must be a number of MiB from 0 to 1e12, got inf",
    ),
    "no target": (["data.target="], "data.target and data.text cannot be empty"),
    "attention": (["model.attn_implementation=spda"], "did you mean sdpa?"),
    "tag": (["logger=wandb", f"logger.tags=[{'a' * 65}]"], "logger.tags: the tag 'aaaa"),
    "group as a mapping": (["model={a:1}"], "model cannot be that; valid: model=OPTION"),
    "digits": ([f"adapter.r={'9' * 5000}"], "adapter.r has too many digits; valid: at most 4300"),
    "long name": ([f"model.name_or_path={'a' * 5000}"], "has 5000 characters, and no file has such a name"),
    "long tokenizer": ([f"model.tokenizer=x/{'a' * 300}"], "has 302 characters, and no file has such a name"),
    "module without parameters": (["adapter.modules_to_save=[act_fn]"], "has no parameters; valid: a module that"),
    "module never called": (["adapter.modules_to_save=[layers]"], "is a ModuleList, which is never called; valid:"),
    "metric the higher the better": (["metric=val/token_accuracy"], "higher is better; valid: max"),
    "metric the lower the better": (
        ["metric_mode=max"],
        "would rank a worse val/loss first: lower is better; valid: min",
    ),
    "project": (["logger=wandb", "logger.project=a/b"], "logger.project='a/b' holds /"),
}


@pytest.mark.parametrize("case", CONFIGURATION)
def test_a_wrong_configuration_is_exit_2_and_says_what_is_valid(refuse, case):
    words, said = CONFIGURATION[case]
    code, text = refuse(*words)
    assert said in text, text
    assert code == 2
    assert "Error executing job" not in text  # Hydra's own line
    assert len(text.strip().splitlines()) <= 3  # with what was said before, such as of the rows


def test_a_refused_run_leaves_no_folder_and_takes_none_that_holds_something(refuse, tmp_path):
    assert refuse("seed=true")[0] == 2
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "notes.txt").write_text("")
    assert refuse("seed=true")[0] == 2
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["mine", "notes.txt"]
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    assert refuse("seed=true", f"hydra.run.dir={empty / 'run'}")[0] == 2
    assert list(empty.iterdir()) == []  # not of ours, so it stays


def test_a_mode_of_hydras_in_a_file_is_refused(refuse, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    file = tmp_path / "conf" / "experiment" / "many.yaml"
    file.write_text("# @package _global_\nhydra:\n  mode: MULTIRUN\n")
    code, said = refuse("+experiment=many")
    assert code == 2
    assert "conf/experiment/many.yaml: hydra.mode=MULTIRUN is ignored in a file" in said
    assert not (tmp_path / "runs").exists()
    file.write_text("# @package _global_\nhydra:\n  mode: RUN\n")
    assert refuse("+experiment=many", "-m", "seed=0,1")[0] == 2


def test_a_sweep_refuses_a_seed_that_is_none_and_its_record_stays_readable(refuse, tmp_path, capsys):
    code, _ = refuse("-m", "seed=", "hydra.sweep.dir=s")
    assert code == 2
    assert main.run(["ls", "s"]) == 0
    said = capsys.readouterr().out
    assert "damaged" not in said
    assert "seed must be a whole number" in record.read(next((tmp_path / "s").glob("*/result.json")).parent)["error"]


@pytest.mark.parametrize(("command", "more"), [("count", []), ("train", ["--cfg", "job"])])
def test_a_group_given_as_a_mapping_is_refused_by_every_command(command, more, capsys):
    assert main.run([command, "model={a:1}", *more]) == 2
    assert "model cannot be that; valid: model=OPTION" in capsys.readouterr().err


def test_a_classifier_completes_no_rows(refuse):
    words = ["model.task=sequence_classification", "data.prompt=null", "data.target=null", "data.text='{q}'"]
    code, text = refuse(*words, "data.label=a", "data.generate_rows=5")
    assert (code, "data.generate_rows=5: a classifier generates no text; valid: 0" in text) == (2, True)


@pytest.mark.parametrize("key", ["train", "validation"])
def test_a_data_file_whose_name_is_too_long_is_exit_3(refuse, key):
    code, text = refuse(f"data.{key}={'a' * 5000}")
    assert (code, f"data.{key}=aaaa" in text, len(text) < 500) == (3, True, True)


@pytest.mark.parametrize(
    ("template", "said"), [("{questoin}", "did you mean question?"), ("{q}", "(has: question, a)")]
)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_rows_are_checked_before_a_weight_is_read_and_leave_no_record(refuse, tmp_path, ending, template, said):
    path = tmp_path / f"rows.{ending}"
    path.write_text('{"question": "one", "a": "two"}\n' if ending == "jsonl" else "question,a\none,two\n")
    code, text = refuse(f"data.train={path}", f"data.prompt='{template}'", "hydra.run.dir=run")
    assert (code, said in text, "loading the base" in text) == (3, True, False)
    assert not (tmp_path / "run" / record.RESULT).exists()


def test_doctor_takes_no_settings(capsys):
    assert main.run(["doctor", "x=1"]) == 2
    assert "loralab doctor takes no settings, got 'x=1'" in capsys.readouterr().err


def test_full_fine_tuning_of_a_quantized_base_is_exit_2(tiny_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [word for word in tiny_arguments if not word.startswith("adapter.")]
    assert main.run(["train", *words, "adapter=full", "quantization=nf4"]) == 2
    assert "adapter=full cannot train the quantized layer" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(refuse):
    code, text = refuse("trainer=gpu")
    assert (code, "no CUDA device" in text) == (2, True)


def write(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"q": "one ", "a": "two"}


def test_a_missing_data_file_is_exit_3(refuse):
    code, text = refuse("data.train=missing.jsonl")
    assert code == 3
    assert "missing.jsonl" in text


@pytest.mark.parametrize(
    ("row", "said"),
    [("{broken\n", ":2"), ({"q": "one"}, "a"), ({"q": 1, "a": ["x"]}, "a"), ({"q": "x", "a": ""}, "empty")],
    ids=["json", "field", "type", "empty"],
)
def test_a_malformed_row_is_exit_3_with_file_and_line(refuse, tmp_path, row, said):
    path = write(tmp_path, GOOD, row, GOOD)
    code, text = refuse(f"data.train={path}")
    assert code == 3
    assert "rows.jsonl:2" in text
    assert said in text


def test_an_empty_split_is_exit_3(refuse, tmp_path):
    code, text = refuse(f"data.train={write(tmp_path)}")
    assert code == 3
    assert "rows.jsonl" in text or "train" in text


def test_a_label_out_of_range_is_exit_3(refuse, tmp_path, tokenizer_folder):
    path = write(tmp_path, {"t": "good", "y": 0}, {"t": "bad", "y": 7})
    words = [
        *("model.task=sequence_classification", "data.prompt=null", "data.target=null", "data.text='{t}'"),
        *("data.label=y", "data.labels=[no,yes]", f"data.train={path}", f"data.validation={path}"),
    ]
    code, text = refuse(*words)
    assert code == 3
    assert "rows.jsonl:2" in text


def test_a_model_folder_without_weights_is_exit_2(refuse, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    code = main.run(["train", "model=hf", f"model.name_or_path={tmp_path / 'model'}", "logger=none"])
    assert code == 2


def test_a_checkpoint_that_is_already_quantized_is_exit_2(tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    stored = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(stored))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(pretrained.ConfigError, match="already quantized \\(gptq\\)"):
        loading.load(pretrained.Pretrained(name_or_path=str(folder)), NoQuantization(), None)


def test_bitsandbytes_missing_is_exit_2_and_names_a_way_out(refuse, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "bitsandbytes":
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    code, text = refuse("optimizer=paged_adamw")
    assert code == 2
    assert "pip install bitsandbytes" in text
    code, text = refuse("quantization=nf4")
    assert code == 2
    assert "pip install bitsandbytes" in text


def test_a_run_whose_gradient_vanishes_is_exit_5(tmp_path, monkeypatch, capsys):
    """At this learning rate every position becomes the same: the loss is ln(vocabulary) and nothing moves any more."""
    monkeypatch.chdir(tmp_path)
    words = ["trainer=cpu", "trainer.max_steps=5", "data.limit=6", "data.batch_size=2", "logger=none", "callbacks=none"]
    words.append("plan.record=false")
    assert main.run(["train", *words, "optimizer.lr=1e6", "hydra.run.dir=run"]) == 5
    assert "the gradient is exactly zero at step" in capsys.readouterr().err
    assert record.read(tmp_path / "run")["status"] == "diverged"


def test_a_run_that_diverges_is_exit_5(refuse, tmp_path):
    code, text = refuse("optimizer.lr=1e30", "trainer.gradient_clip_val=null", "trainer.max_steps=8")
    assert code == 5
    assert "not finite" in text


def test_out_of_memory_is_exit_6(refuse, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loading, "load", full)
    code, text = refuse()
    assert code == 6
    assert "data.batch_size" in text


def test_a_run_folder_that_cannot_be_made_is_exit_7(refuse, tmp_path):
    (tmp_path / "taken").write_text("a file")
    code, text = refuse(f"hydra.run.dir={tmp_path / 'taken' / 'run'}")
    assert code == 7
    assert "taken" in text


def test_a_name_of_a_run_folder_that_is_too_long_is_exit_7(refuse, tmp_path):
    code, text = refuse(f"hydra.run.dir={tmp_path / ('a' * 300)}")
    assert (code, "aaa" in text, "loading the base" in text) == (7, True, False), text


def test_a_metric_that_the_run_does_not_produce_is_named(refuse):
    code, text = refuse("metric=val/los")
    assert code == 2
    assert "did you mean val/loss" in text


def test_report_of_an_empty_folder_is_exit_4(tmp_path, capsys):
    assert main.run(["report", str(tmp_path)]) == 4
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["trian"], 2, "did you mean train?"),
        (["sweep"], 2, "quickstart"),
        (["sweep", "rnak"], 2, "did you mean rank?"),
        (["report"], 2, "one folder"),
        (["count", "adapter"], 2, "key=value"),
        (["train", "--nonsense"], 2, "--nonsense"),
    ],
)
def test_a_command_line_that_is_not_understood(words, code, said, capsys):
    try:
        got = main.run(words)
    except SystemExit as error:  # argparse, inside Hydra
        got = error.code
    assert got == code
    assert said in capsys.readouterr().err


def test_the_environment_is_left_alone():
    assert "WANDB_MODE" not in os.environ
