"""The predicted peak of a run's record beside the allocator's own, alone and packed, on rows of differing lengths."""

import gzip
import json
from dataclasses import replace

import pytest

from loralab.adapters.bitfit import BitFit
from loralab.adapters.bottleneck import Bottleneck
from loralab.adapters.full import Full
from loralab.adapters.ia3 import IA3
from loralab.adapters.last_layer import LastLayer
from loralab.adapters.lora import LoRA
from loralab.data.files import Files
from loralab.memory.budget import PlanSpec
from loralab.memory.phases import PhaseMemory
from loralab.models import pretrained
from loralab.planning.foresee import Foresight
from loralab.planning.resident import settled
from loralab.quantization.four_bit import FourBit
from loralab.quantization.none import NoQuantization
from loralab.running.runner import Runner

SCHEMES = {"none": NoQuantization(), "nf4_double": FourBit(double_quant=True)}
GPT2 = {"model_type": "gpt2", "vocab_size": 4096, "n_embd": 128, "n_layer": 4, "n_head": 4}
T5 = {"model_type": "t5", "vocab_size": 4096, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
SHORT = {"max_length": 128}


def bases(data):
    return {
        "shipped": pretrained.Pretrained(dtype="float32", **SHORT),
        "stories": pretrained.Pretrained(name_or_path=str(data / "weights" / "stories260K-hf"), **SHORT),
        "gpt2": pretrained.Random(config=GPT2, **SHORT),
        "t5": pretrained.Random(task="seq2seq_lm", config=T5, **SHORT),
    }


@pytest.fixture(scope="session")
def speeches(real_data, tmp_path_factory):
    """Prompts and targets from a play: paths of 60 training and 12 validation rows."""
    with gzip.open(real_data / "tinyshakespeare" / "train.txt.gz", "rt") as file:
        parts = [part for part in file.read(40_000).split("\n\n") if len(part) > 20][:72]
    rows = [json.dumps({"q": part[: len(part) // 2], "a": part[len(part) // 2 :]}) + "\n" for part in parts]
    folder = tmp_path_factory.mktemp("speeches")
    (folder / "train.jsonl").write_text("".join(rows[:60]))
    (folder / "validation.jsonl").write_text("".join(rows[60:]))
    return {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}


FAST = {("stories", "nf4_double", 3), ("t5", "none", 1)}
CASES = [(name, scheme, size) for name in ("shipped", "stories", "gpt2", "t5") for scheme in SCHEMES for size in (1, 3)]


@pytest.mark.parametrize(
    ("name", "scheme", "size"),
    [
        pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow, id="-".join(map(str, case)))
        for case in CASES
    ],
)
def test_prediction_and_measurement_agree(make_spec, real_data, speeches, name, scheme, size):
    data = Files(**speeches, prompt="{q}", target="{a}", batch_size=3)
    changes = {"model": bases(real_data)[name], "quantization": SCHEMES[scheme], "data": data, "max_steps": 6}
    observed = {"memory": PhaseMemory}
    made = [make_spec(f"{n}", adapter=LoRA(r=4 << n), seed=n, callbacks=observed, **changes) for n in range(size)]
    runner = Runner()
    records = runner.run([replace(spec, plan=PlanSpec()) for spec in made])
    assert [one["error"] for one in records] == [None] * size
    for one in records:
        memory = one["memory"]
        assert memory["predicted_peak_bytes"] == pytest.approx(memory["measured_peak_bytes"], rel=0.05)
    if size == 1:  # the largest batch that the rows can make is no smaller than any that came
        alone = memory["alone_peak_bytes"]
        if records[0]["base"]["dequantize"] == "resident":  # dense weights, kept where there is room: not part of it
            (with_them,) = settled([replace(made[0], plan=PlanSpec())], "resident")
            lean, alone = alone, Foresight().alone(with_them, runner.inputs.rows(made[0]))
            assert alone > lean
        assert alone >= 0.99 * memory["measured_peak_bytes"]


METHODS = {
    "bitfit": BitFit(),
    "last_layer": LastLayer(),
    "adapterl": Bottleneck(variant="adapterl"),
    "ia3": IA3(),
    "dora": LoRA(r=8, use_dora=True),
    "embedding": LoRA(r=64, target_modules=["wte", "c_attn"]),
}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name in ("dora", "last_layer", "embedding") else pytest.mark.slow)
        for name in METHODS
    ],
)
def test_the_prediction_of_every_method_is_its_measurement(make_spec, speeches, method):
    data = Files(**speeches, prompt="{q}", target="{a}", batch_size=3)
    model = pretrained.Random(config={**GPT2, "n_layer": 2}, **SHORT)
    changes = {"model": model, "quantization": FourBit(), "data": data, "max_steps": 4}
    observed = {"memory": PhaseMemory}
    pack = [make_spec(f"{n}", adapter=METHODS[method], seed=n, callbacks=observed, **changes) for n in range(2)]
    records = Runner().run([replace(spec, plan=PlanSpec()) for spec in pack])
    assert [one["error"] for one in records] == [None] * 2
    for one in records:
        memory = one["memory"]
        assert memory["predicted_peak_bytes"] == pytest.approx(memory["measured_peak_bytes"], rel=0.05)


def test_the_prediction_of_full_fine_tuning_is_its_measurement_to_the_byte(make_spec, speeches):
    data = Files(**speeches, prompt="{q}", target="{a}", batch_size=3)
    changes = {"model": pretrained.Random(config=GPT2, **SHORT), "data": data, "max_steps": 4}
    spec = make_spec(adapter=Full(), callbacks={"memory": PhaseMemory}, **changes)
    record = Runner().run([replace(spec, plan=PlanSpec())])[0]
    memory = record["memory"]
    assert memory["predicted_peak_bytes"] == pytest.approx(memory["measured_peak_bytes"], rel=1e-5)
    assert sum(memory["predicted_by_kind"].values()) == memory["predicted_peak_bytes"]
    trained, stored = 4 * record["adapter"]["trainable_parameters"], memory["predicted_by_kind"]
    assert stored["optimizer"] == pytest.approx(2 * trained, rel=1e-3)  # two moments
    assert stored["adapter"] == pytest.approx(trained, rel=1e-3)


MIXTRAL = {
    **{"model_type": "mixtral", "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4},
}


def test_the_prediction_of_experts_with_their_own_update_is_its_measurement(make_spec, speeches):
    data = Files(**speeches, prompt="{q}", target="{a}", batch_size=3)
    adapter = LoRA(r=8, target_modules=None, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    changes = {"model": pretrained.Random(config=MIXTRAL, **SHORT), "data": data, "max_steps": 4}
    spec = make_spec(adapter=adapter, callbacks={"memory": PhaseMemory}, **changes)
    record = Runner().run([replace(spec, plan=PlanSpec())])[0]
    assert record["error"] is None
    memory = record["memory"]
    assert memory["predicted_peak_bytes"] == pytest.approx(memory["measured_peak_bytes"], rel=0.05)
    assert memory["alone_peak_bytes"] >= 0.99 * memory["measured_peak_bytes"]
