"""Targets are tokenized as targets: what is fed is what transformers feeds by ``text_target``."""

import json

import pytest
import torch
import transformers

from loralab.data.base import Row, make_splits
from loralab.data.batches import collate
from loralab.data.encoding import Encoder, encode
from loralab.errors import ConfigError
from loralab.forward.metrics import nll
from loralab.quantization.sequences import decoder_input_ids
from loralab.training.generation import Writer, answers

ROWS = [("a text with words", "un text"), ("some", "other words in it"), ("words it", "a")]
CORPUS = ["a text with words in it", "some other text", "un text words"] * 4
SIZES = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.4, "dropout": 0.0},
    **{"max_position_embeddings": 64},
}


def letters():
    return sorted(set("".join(CORPUS)) - {" "})


def mbart(folder):
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary += [(letter, -3.0) for letter in letters()]
    return transformers.MBartTokenizer(vocab=vocabulary, src_lang="en_XX", tgt_lang="ro_RO"), "MBart"


def mbart50(folder):
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary += [(letter, -3.0) for letter in letters()]
    return transformers.MBart50Tokenizer(vocab=vocabulary, src_lang="en_XX", tgt_lang="ro_RO"), "MBart"


def nllb(folder):
    names = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", *letters()]
    made = transformers.NllbTokenizer(
        vocab={name: at for at, name in enumerate(names)}, merges=[], src_lang="eng_Latn", tgt_lang="ron_Latn"
    )
    return made, "M2M100"


def pieces(folder, name):
    library = pytest.importorskip("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    library.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / name), vocab_size=30, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    processor = library.SentencePieceProcessor(str(folder / f"{name}.model"))
    vocabulary = {processor.id_to_piece(at): at for at in range(len(processor))}
    vocabulary["<pad>"] = len(vocabulary)
    (folder / f"{name}.json").write_text(json.dumps(vocabulary))
    return str(folder / f"{name}.model"), str(folder / f"{name}.json")


def m2m(folder):
    model, vocabulary = pieces(folder, "m2m")
    return transformers.M2M100Tokenizer(vocabulary, model, src_lang="en", tgt_lang="ro"), "M2M100"


def marian(folder):
    """Source and target have a model each, which split words at other places."""
    source, vocabulary = pieces(folder, "source")
    library = pytest.importorskip("sentencepiece")
    library.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "target"), model_type="char", minloglevel=2
    )
    return transformers.MarianTokenizer(source, str(folder / "target.model"), vocabulary), "Marian"


@pytest.fixture(scope="module", params=[mbart, mbart50, nllb, m2m, marian], ids=lambda kind: kind.__name__)
def pair(request, tmp_path_factory):
    """(tokenizer, model) of a family that translates."""
    tokenizer, family = request.param(tmp_path_factory.mktemp("tokenizer"))
    used = [at for source, target in ROWS for ids in tokenizer(source, text_target=target).values() for at in ids]
    own = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=max(len(tokenizer), *tokenizer.all_special_ids, *used) + 1, **SIZES, **own,
        decoder_start_token_id=tokenizer.pad_token_id if family == "Marian" else tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return tokenizer, transformers.AutoModelForSeq2SeqLM.from_config(config).eval()


def encoded(tokenizer, length=64):
    rows = [Row(source, target) for source, target in ROWS]
    return encode(make_splits("t", {"train": rows, "validation": rows}), tokenizer, "seq2seq_lm", length)


def test_source_and_target_are_what_transformers_makes_of_them(pair):
    tokenizer, _ = pair
    right = [tokenizer(source, text_target=target) for source, target in ROWS]
    made = encoded(tokenizer).train
    assert [one.input_ids for one in made] == [one["input_ids"] for one in right]
    assert [one.labels for one in made] == [one["labels"] for one in right]


@torch.no_grad()
def test_the_loss_is_transformers_own(pair):
    tokenizer, model = pair
    batch = collate(encoded(tokenizer).train, "seq2seq_lm", tokenizer.pad_token_id)
    labels = batch.pop("labels")
    logits = model(**batch, decoder_input_ids=decoder_input_ids(model, labels)).logits
    total, _, targets = nll(logits, labels, "seq2seq_lm")
    right, count = 0.0, 0
    for source, target in ROWS:
        one = tokenizer(source, text_target=target, return_tensors="pt")
        right += float(model(**one).loss) * one["labels"].numel()
        count += one["labels"].numel()
    assert len(targets) == count
    assert float(total) == pytest.approx(right, rel=1e-5)


@torch.no_grad()
def test_a_completion_begins_as_a_target_of_training_does(pair):
    """Fed with what training feeds before the target, token by token."""
    tokenizer, model = pair
    writer = Writer(model, tokenizer, None, "seq2seq_lm", 64)
    one = tokenizer(ROWS[0][0], text_target=ROWS[0][1], return_tensors="pt")
    prefix = writer.encoder.target_prefix
    assert one["labels"][0, : len(prefix)].tolist() == prefix
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    model(**one)
    hook.remove()
    fed = seen[0]["input_ids"][0, : 1 + len(prefix)].tolist()
    del one["labels"]
    made = []
    while len(made) < 9 and tokenizer.eos_token_id not in made:
        logits = model(**one, decoder_input_ids=torch.tensor([fed + made])).logits
        made.append(int(logits[0, -1].argmax()))
    assert writer.complete([one["input_ids"][0].tolist()], [9]) == [writer.cut(made)]
    completions, targets = answers(writer, [Row(*row) for row in ROWS])
    assert len(completions) == len(targets) == len(ROWS)


def test_a_cut_target_keeps_its_frame(pair):
    tokenizer, _ = pair
    encoder = Encoder(tokenizer, "seq2seq_lm", 6)
    made = encoded(tokenizer, 6).train[0]
    end = encoder.target_suffix
    assert len(made.labels) == len(made.input_ids) == 6
    assert made.labels[-len(end) :] == end
    assert made.labels[: len(encoder.target_prefix)] == encoder.target_prefix
    assert made.truncated


def test_a_quoted_special_token_is_text_in_source_and_target(pair):
    tokenizer, _ = pair
    rows = [Row("a </s> text", "un </s> <pad> text")]
    made = encode(make_splits("t", {"train": rows}), tokenizer, "seq2seq_lm", 64).train[0]
    plain = tokenizer("a", text_target="a")
    for ids, framed in ((made.input_ids, plain["input_ids"]), (made.labels, plain["labels"])):
        assert ids.count(tokenizer.eos_token_id) == framed.count(tokenizer.eos_token_id)
        assert tokenizer.pad_token_id not in ids


@pytest.mark.parametrize("make", [mbart, mbart50])
def test_a_tokenizer_without_a_target_language_is_refused(make, tmp_path):
    tokenizer, _ = make(tmp_path)
    tokenizer.tgt_lang = None
    with pytest.raises(ConfigError, match=r"has no target language.*tgt_lang"):
        encoded(tokenizer)
