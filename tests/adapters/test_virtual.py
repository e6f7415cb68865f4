"""Virtual tokens, as keys and values (prefix) or as embeddings (prompt), against PEFT, and in the company of others."""

import logging

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from loralab.adapters.attached import attached
from loralab.adapters.export import load, save
from loralab.adapters.hooks import AdapterHooks, BatchSlice, NotPackable
from loralab.adapters.lora import LoRA
from loralab.adapters.prefix import Prefix
from loralab.adapters.prompt import Prompt
from loralab.memory.budget import PlanSpec
from loralab.memory.phases import PhaseMemory
from loralab.models import loading, pretrained
from loralab.optim.optimizers import AdamW
from loralab.quantization.four_bit import FourBit
from loralab.quantization.int8_blockwise import Int8Blockwise
from loralab.quantization.llm_int8 import LLMInt8
from loralab.quantization.none import NoQuantization
from loralab.running.runner import Runner
from loralab.training.generation import complete

METHODS = {"prefix": Prefix, "prompt": Prompt}
SCHEMES = {"none": NoQuantization(), "int8": Int8Blockwise(), "llm_int8": LLMInt8(), "nf4": FourBit()}
LAYERS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {"initializer_range": 0.2}
BART = {
    **{"d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 128},
}
OPT = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 64}
T5 = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2}
BASES = {  # {name: (task, config)}
    "llama": ("causal_lm", {"model_type": "llama", **LAYERS, **WIDE, "num_key_value_heads": 1}),
    "gpt2": ("causal_lm", {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128, **WIDE}),
    "phi": ("causal_lm", {"model_type": "phi", **LAYERS}),
    "opt": ("causal_lm", {"model_type": "opt", **OPT, "init_std": 0.2}),
    "t5": ("seq2seq_lm", {"model_type": "t5", **T5, "decoder_start_token_id": 0}),
    "bart": ("seq2seq_lm", {"model_type": "bart", **BART, "decoder_start_token_id": 1, "init_std": 0.2}),
    "bert": ("sequence_classification", {"model_type": "bert", **LAYERS}),
    "roberta": ("sequence_classification", {"model_type": "roberta", **LAYERS, "max_position_embeddings": 130}),
    "llama classifier": ("sequence_classification", {"model_type": "llama", **LAYERS, "num_key_value_heads": 2}),
}
QUICK = {("llama", "nf4"), ("gpt2", "none"), ("t5", "int8"), ("bart", "nf4"), ("bert", "llm_int8"), ("roberta", "none")}
QUICK |= {("llama classifier", "none"), ("phi", "llm_int8"), ("opt", "none"), ("t5", "llm_int8")}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def small(tokenizer_folder):
    """A loaded base of BASES."""

    def make(name, scheme="none"):
        task, config = BASES[name]
        spec = pretrained.Random(
            task=task, config={"vocab_size": 258, **config}, tokenizer=str(tokenizer_folder), dropout=0.0, max_length=64
        )
        return loading.load(spec, SCHEMES[scheme], spec.load_tokenizer(), 3)

    return make


def rows(task, padded=True):
    ids = torch.randint(2, 256, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, -4:] = 0
        ids[1, -4:] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    return {**made, "decoder_input_ids": ids[:, :7]} if task == "seq2seq_lm" else made


def alone(given, row):
    """One row without its padding."""
    length = int(given["attention_mask"][row].sum())
    return {key: value[row : row + 1, : None if "decoder" in key else length] for key, value in given.items()}


def logits(model, given, *slices):
    model.eval()
    with torch.no_grad(), AdapterHooks.of(model).batch(*slices):
        return model(**given).logits


def moved(spec, model, seed=0):
    adapter = attached(spec, model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return adapter


def cases():
    made = [(name, scheme) for name in BASES for scheme in SCHEMES]
    return [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in made]


@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.parametrize(("name", "scheme"), cases())
def test_the_exported_files_give_pefts_logits_and_ours(method, small, tmp_path, name, scheme):
    base = small(name, scheme)
    adapter = moved(method(num_virtual_tokens=5), base.model)
    given = rows(base.spec.task, padded=False)
    save(adapter, tmp_path / "adapter")
    again = small(name, scheme)
    ours = logits(base.model, given, BatchSlice(adapter, 2))
    loaded = load(tmp_path / "adapter", again.model)
    assert torch.equal(logits(again.model, given, BatchSlice(loaded, 2)), ours)
    theirs = PeftModel.from_pretrained(small(name, scheme).model, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(**given).logits
    if expected.dim() > 2:
        expected = expected[:, -ours.shape[1] :]  # PEFT gives the virtual tokens' too
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, logits(base.model, given), atol=1e-3)


@pytest.mark.parametrize(("name", "scheme"), cases())
def test_a_padded_row_beside_others_is_what_it_is_alone(method, small, name, scheme):
    base = small(name, scheme)
    one, other = (moved(method(num_virtual_tokens=5), base.model, seed) for seed in (0, 1))
    given = rows(base.spec.task)
    together = logits(base.model, given, BatchSlice(one, 1), BatchSlice(other, 1))
    for row, adapter in enumerate((one, other)):
        own = logits(base.model, alone(given, row), BatchSlice(adapter, 1))[0]
        beside = together[row] if own.dim() < 2 else together[row, : len(own)]
        torch.testing.assert_close(beside, own, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("width", [11, 12, 13, 16, 17, 18])
def test_scales_over_sequences_are_apart_where_encoder_and_decoder_are_of_one_width(method, small, width):
    """With the prompt, with one column more of padding, or by chance. (Where two rows' rounding differs, a value on the
    edge between two int8 codes may fall on either side; with these ids none does.)"""
    base = small("t5", "llm_int8")
    adapter = moved(method(num_virtual_tokens=5), base.model)
    given = rows("seq2seq_lm")
    ids = torch.randint(2, 256, (2, width), generator=torch.Generator().manual_seed(7))
    given["decoder_input_ids"] = ids
    together = logits(base.model, given, BatchSlice(adapter, 2))
    for row in range(2):
        own = logits(base.model, alone(given, row), BatchSlice(adapter, 1))[0]
        torch.testing.assert_close(together[row], own, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [*((name, "none") for name in ("llama", "gpt2", "opt", "t5", "bart")), ("llama", "llm_int8"), ("t5", "llm_int8")],
)
def test_text_is_written_as_by_passes_over_all_that_stands_before(method, small, name, scheme):
    base = small(name, scheme)
    adapter = moved(method(num_virtual_tokens=5), base.model)
    task, prompts = base.spec.task, ["a", "some more words", "of another length"]
    made = complete(base.model, base.tokenizer, adapter, prompts, task, 8, 64)
    assert made != complete(base.model, base.tokenizer, None, prompts, task, 8, 64)
    assert made == [greedy(base, adapter, prompt, 8) for prompt in prompts]


def greedy(base, adapter, prompt, room):
    from loralab.training.generation import Writer

    writer = Writer(base.model, base.tokenizer, adapter, base.spec.task, 64)
    suffix = writer.encoder.suffix if base.spec.task == "seq2seq_lm" else []
    ids = torch.tensor([[*writer.encoder.prefix, *writer.encoder.token_ids([prompt])[0], *suffix]])
    written = torch.tensor([writer.start], dtype=torch.long)
    skipped = written.shape[1]
    for _ in range(room):
        if base.spec.task == "seq2seq_lm":
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": written}
        else:
            whole = torch.cat([ids, written.long()], 1)
            given = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        best = logits(base.model, given, BatchSlice(adapter, 1))[:, -1:].argmax(-1)
        written = torch.cat([written, best], 1)
    return writer.text(writer.cut(written[0, skipped:].tolist()))


def test_beams_are_rows_of_their_trial(method, small):
    base = small("llama")
    adapter = moved(method(num_virtual_tokens=5), base.model)
    given = rows("causal_lm", padded=False)
    with AdapterHooks.of(base.model).batch(BatchSlice(adapter, 2)):
        both = base.model.generate(**given, num_beams=3, max_new_tokens=5, do_sample=False)
    with AdapterHooks.of(base.model).batch(BatchSlice(adapter, 1)):
        first = base.model.generate(**alone(given, 0), num_beams=3, max_new_tokens=5, do_sample=False)
    assert torch.equal(both[:1], first)


def test_rows_with_other_numbers_of_them_share_no_pass(method, small):
    model = small("llama").model
    five, six = (attached(method(num_virtual_tokens=n), model) for n in (5, 6))
    lora = attached(LoRA(r=4), model)
    for other in (six, lora):
        with pytest.raises(NotPackable, match="other numbers of virtual tokens"):
            logits(model, rows("causal_lm"), BatchSlice(five, 1), BatchSlice(other, 1))


def test_a_detached_adapter_leaves_the_bare_base(method, small):
    model = small("llama").model
    bare = logits(model, rows("causal_lm"))
    adapter = attached(method(num_virtual_tokens=5), model)
    assert not torch.equal(logits(model, rows("causal_lm"), BatchSlice(adapter, 2)), bare)
    assert torch.equal(logits(model, rows("causal_lm")), bare)
    adapter.detach()
    assert not model.base_model._forward_pre_hooks
    assert not model.base_model._forward_hooks


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "t5"))]
)
def test_trials_of_one_pack_train_as_alone_and_the_log_says_who_goes_apart(method, make_spec, curve, caplog, family):
    caplog.set_level(logging.INFO, logger="loralab")
    adapters = [method(num_virtual_tokens=4), LoRA(r=4), method(num_virtual_tokens=4), method(num_virtual_tokens=6)]

    def four(prefix):
        rates = {"optimizer": AdamW(lr=2e-2), "val_check_interval": 2, "max_steps": 3}
        return [make_spec(f"{prefix}{i}", family, adapter=own, seed=i, **rates) for i, own in enumerate(adapters)]

    packed, solo = four("packed"), four("solo")
    assert [one["pack"]["size"] for one in Runner().run(packed)] == [2, 1, 2, 1]
    assert "the others run before or after them" in caplog.text
    for one, other in zip(packed, solo, strict=True):
        (record,) = Runner().run([other])
        assert record["status"] == "completed", record["error"]
        exact = family == "llama"  # whose rows are of one length
        for key in ("train/loss", "train/grad_norm", "val/loss"):
            ours, theirs = curve(one.folder, key), curve(other.folder, key)
            assert ours == (theirs if exact else pytest.approx(theirs, rel=1e-4))
        left, right = (load_file(trial.folder / "adapter" / "adapter_model.safetensors") for trial in (one, other))
        assert all(torch.equal(left[key], right[key]) for key in left) or not exact


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_rows_that_do_not_fit_behind_them_are_refused_before_weights_are_read(
    method, make_spec, make_model, monkeypatch, family
):
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("the base was loaded"))
    model = make_model(family, max_length=124)
    (record,) = Runner().run([make_spec(family=family, adapter=method(num_virtual_tokens=5), model=model)])
    assert record["exit_code"] == 2
    assert "adapter.num_virtual_tokens=5" in record["error"]
    assert "model.max_length of at most 123" in record["error"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_bases_own_dropout_is_drawn_for_each_trial(method, make_spec, make_model, curve, family):
    model = make_model(family, dropout=0.1)

    def two(prefix):
        adapter = method(num_virtual_tokens=4)
        changes = {"adapter": adapter, "model": model, "max_steps": 2}
        return [make_spec(f"{prefix}{i}", family, seed=i, **changes) for i in range(2)]

    packed, solo = two("packed"), two("solo")
    assert [one["pack"]["size"] for one in Runner().run(packed)] == [2, 2]
    for one, other in zip(packed, solo, strict=True):
        assert Runner().run([other])[0]["status"] == "completed"
        assert curve(one.folder) == curve(other.folder)


@pytest.mark.parametrize(
    ("family", "scheme", "precision"),
    [("llama", "none", "bf16-true"), ("t5", "nf4", "bf16-mixed"), ("roberta", "llm_int8", "bf16-mixed")],
)
def test_a_run_in_bfloat16_trains_scores_and_writes_text(
    method, make_spec, make_data, curve, family, scheme, precision
):
    written = family != "roberta"
    data = make_data("pairs" if written else "labels", **({"generate_rows": 3} if written else {}))
    changes = {"quantization": SCHEMES[scheme], "data": data, "precision": precision, "max_steps": 20}
    changes["val_check_interval"] = 10
    spec = make_spec(family=family, adapter=method(num_virtual_tokens=4), **changes)
    (record,) = Runner().run([spec])
    assert record["status"] == "completed", record["error"]
    first, last = curve(spec.folder, "val/loss")[0], curve(spec.folder, "val/loss")[-1]
    assert last < first
    assert ("val/rouge_l" in record["metrics"]) == written


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        pytest.param("gpt2", "none", marks=pytest.mark.slow),
        ("t5", "nf4"),
        pytest.param("roberta", "none", marks=pytest.mark.slow),
    ],
)
def test_predicted_memory_is_within_five_percent(method, make_spec, make_model, family, scheme):
    tall = {"gpt2": {"n_layer": 8}, "t5": {"num_layers": 3}, "roberta": {"num_hidden_layers": 7}}
    spec = make_spec(
        family=family,
        model=make_model(family, config=tall[family]),
        adapter=method(num_virtual_tokens=24),
        callbacks={"memory": PhaseMemory},
        plan=PlanSpec(record=True),
        quantization=SCHEMES[scheme],
        max_steps=6,
    )
    (record,) = Runner().run([spec])
    assert record["status"] == "completed", record["error"]
    memory = record["memory"]
    assert memory["predicted_peak_bytes"] == pytest.approx(memory["measured_peak_bytes"], rel=0.05)


def test_the_plan_of_trials_that_share_no_pass_is_the_largest_of_theirs(method, make_spec):
    specs = [make_spec(f"{n}", adapter=own, plan=PlanSpec(record=True)) for n, own in enumerate((LoRA(r=4), method()))]
    runner = Runner()
    data = [runner.inputs.rows(spec) for spec in specs]
    both = runner.foresight.plan(specs, data, "cpu")
    each = [runner.foresight.plan([spec], [rows], "cpu") for spec, rows in zip(specs, data, strict=True)]
    assert both.predicted_peak_bytes == max(one.predicted_peak_bytes for one in each)
