"""Special tokens in a row are text; those of a template are special; whatever kind of tokenizer."""

import json

import pytest
import transformers

from loralab.data.base import Row, make_splits
from loralab.data.encoding import Encoder, encode
from loralab.data.fields import Template, TemplateText
from loralab.data.files import Files
from loralab.data.tokenizer import train_tokenizer

CORPUS = ["a text with words in it", "some <other> text / with marks", "s </ > < pad bos"] * 4


def unigram(folder):
    """As T5's and XLM-R's: the special tokens are pieces of the model."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import Unigram

    backend = Tokenizer(Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=specials, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return fast(backend, unk_token="<unk>")


def pieces(folder):
    """WordPiece; words with the names of special tokens are in its vocabulary."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordPiece

    letters = sorted(set("".join(CORPUS)) - {" "})
    names = ["<pad>", "</s>", "<unk>", *letters, *(f"##{letter}" for letter in letters)]
    backend = Tokenizer(WordPiece({name: at for at, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(backend, unk_token="<unk>")


def whole_words(folder):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    names = ["<pad>", "</s>", "<unk>", *sorted({word for line in CORPUS for word in line.split()})]
    backend = Tokenizer(WordLevel({name: at for at, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(backend, unk_token="<unk>")


def byte_fallback(folder):
    """BPE as Llama's: a space is a letter, the first word is marked by one, bytes for what is unknown."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    names = [
        "<unk>",
        "<pad>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *sorted(set("".join(CORPUS))),
    ]
    vocabulary = {name: at for at, name in enumerate(dict.fromkeys(names))}
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]  # which make the special token
    vocabulary.update({name: len(vocabulary) + at for at, name in enumerate(["</", "</s"])})
    backend = Tokenizer(BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(backend, unk_token="<unk>")


def fast(backend, **names):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False, **names
    )


def byte_level(folder):
    return train_tokenizer(CORPUS, 290)


def slow_bytes(folder):
    return transformers.ByT5Tokenizer(extra_ids=0)


def slow_words(folder):
    """A tokenizer without a backend whose words may be special tokens' names."""
    names = ["<pad>", "</s>", "<unk>", *sorted({word for line in CORPUS for word in line.split()})]
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({name: at for at, name in enumerate(names)}))
    merges.write_text("#version\n")
    return transformers.CTRLTokenizer(
        str(vocabulary), str(merges), unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )


def sentence_pieces(folder):
    """A slow tokenizer over a model of the sentencepiece library."""
    library = pytest.importorskip("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    library.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spm"), vocab_size=44, pad_id=3, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    return transformers.GPTSw3Tokenizer(
        str(folder / "spm.model"), pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )


KINDS = [byte_level, unigram, pieces, whole_words, byte_fallback, slow_bytes, slow_words, sentence_pieces]
LOSSLESS = {byte_level, unigram, byte_fallback, slow_bytes, sentence_pieces}


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def kind(request, tmp_path_factory):
    return request.param, request.param(tmp_path_factory.mktemp("tokenizer"))


def special(tokenizer, ids):
    unknown = tokenizer.unk_token_id
    return [one for one in ids if one in tokenizer.all_special_ids and one != unknown]


@pytest.mark.parametrize("text", ["a </s> text", "</s>", "a</s>text", "some <pad></s> text", "</s", "<pad>a"])
def test_what_a_row_quotes_is_text(kind, text):
    make, tokenizer = kind
    (ids,) = Encoder(tokenizer, "causal_lm", 64).token_ids([text])
    assert ids
    assert special(tokenizer, ids) == []
    if make in LOSSLESS:
        assert tokenizer.decode(ids).strip() == text


@pytest.mark.parametrize("text", ["a text", "some <other> text / with marks", "s"])
def test_a_text_that_quotes_none_is_the_tokenizers_own(kind, text):
    _, tokenizer = kind
    assert Encoder(tokenizer, "causal_lm", 64).token_ids([text]) == [
        tokenizer(text, add_special_tokens=False)["input_ids"]
    ]


@pytest.mark.parametrize("template", ["{q}</s>some", "</s>{q}", "some </s> {q} </s> text", "{q}</s></s>"])
def test_what_a_template_writes_is_special_and_what_its_fields_quote_is_not(kind, template):
    make, tokenizer = kind
    encoder = Encoder(tokenizer, "causal_lm", 64)
    count = template.count("</s>")
    plain, quoting = (Template(template, "prompt").render({"q": q}) for q in ("a text", "a </s> text"))
    ordinary, quoted = encoder.token_ids([plain])[0], encoder.token_ids([quoting])[0]
    assert ordinary == tokenizer(str(plain), add_special_tokens=False)["input_ids"]
    assert special(tokenizer, ordinary) == special(tokenizer, quoted) == [tokenizer.eos_token_id] * count
    # what stands before the field and behind it is what it is in a row that quotes nothing
    head = next((at for at, (one, other) in enumerate(zip(ordinary, quoted, strict=False)) if one != other), 0)
    tail = next(
        (at for at, (one, other) in enumerate(zip(ordinary[::-1], quoted[::-1], strict=False)) if one != other), 0
    )
    assert head + tail >= len(ordinary) - 1
    if make in LOSSLESS:
        assert tokenizer.decode(quoted).count("</s>") == count + 1


def test_the_tokenizer_itself_stays_as_it_was(kind):
    _, tokenizer = kind
    before = tokenizer("a </s> text")["input_ids"]
    Encoder(tokenizer, "causal_lm", 64).token_ids(["a </s> text", TemplateText("a </s> text", ((0, 6),))])
    assert tokenizer("a </s> text")["input_ids"] == before
    assert tokenizer.eos_token_id in before


def test_a_classifier_reads_a_quoted_token_as_text_within_its_own_frame():
    from tokenizers import processors

    tokenizer = byte_level(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A </s>", special_tokens=[("<pad>", tokenizer.pad_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    rows = [Row("a </s> b", "x", 0), Row("c", "y", 1), Row("d " * 20 + "</s>", "y", 1)]
    splits = make_splits("t", {"train": rows, "validation": rows}, kind="labels", labels=["x", "y"])
    made = encode(splits, tokenizer, "sequence_classification", 16).train
    right = tokenizer([row.prompt for row in rows], truncation=True, max_length=16, split_special_tokens=True)
    assert [one.input_ids for one in made] == right["input_ids"]
    assert [one.truncated for one in made] == [False, False, True]


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq_lm"])
def test_one_line_says_where_and_how_many(tmp_path, caplog, task):
    rows = [{"q": "a", "a": "b"}, {"q": "c", "a": "d"}, {"q": "e", "a": "f</s>g"}, {"q": "<pad>", "a": "</s>"}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_level(None)
    splits = Files(train=str(path), validation=str(path), prompt="{q}\n", target="{a}").splits()
    made = encode(splits, tokenizer, task, 64)
    said = [one.getMessage() for one in caplog.records if "special token" in one.getMessage()]
    assert len(said) == 1
    assert "data.jsonl:3 quotes the special token '</s>', read as text (so do 2 rows)" in said[0]
    end = tokenizer.eos_token_id
    assert [one.labels.count(end) for one in made.train] == [1, 1, 1, 1]


def test_a_template_may_end_its_target_itself(caplog):
    tokenizer = byte_level(None)
    encoder = Encoder(tokenizer, "causal_lm", 64)
    written = Template("{a}</s>", "target").render({"a": "b"})
    (made,) = encoder.examples([Row("q", written, where="d.jsonl:1")])
    assert made.labels.count(tokenizer.eos_token_id) == 1
    assert made.input_ids == encoder.examples([Row("q", "b")])[0].input_ids
    encoder.log_notices()
    assert "d.jsonl:1 ends in '</s>', which ends every target: it is there once" in caplog.text


def test_a_first_token_that_the_template_writes_is_there_once(caplog):
    from tokenizers import processors

    tokenizer = byte_level(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", tokenizer.pad_token_id)]
    )
    encoder = Encoder(tokenizer, "causal_lm", 64)
    written = Template("<pad>{q}", "prompt").render({"q": "abc"})
    (made,) = encoder.examples([Row(written, "b", where="d.jsonl:1")])
    assert made.input_ids == encoder.examples([Row("abc", "b")])[0].input_ids
    assert made.input_ids.count(tokenizer.pad_token_id) == 1
    encoder.log_notices()
    assert "d.jsonl:1 begins with '<pad>', which the tokenizer puts there itself" in caplog.text
