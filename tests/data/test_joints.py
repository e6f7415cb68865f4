"""Where prompt and target meet, a tokenizer that marks words by spaces sees one text."""

import pytest
import transformers

from loralab.data.base import Row
from loralab.data.encoder import marks_start
from loralab.data.encoding import IGNORE, Encoder
from loralab.data.fields import Template
from loralab.data.tokenizer import train_tokenizer
from loralab.training.generation import Writer

PAIRS = [
    ("Q: why\n", "because it is"),
    ("Q: why\nA:", " because"),
    ("Q: why ", "because"),
    ("a", "b c"),
    ("two words", " and\nmore"),
    ("x\n", "\ny"),
    ("", "alone here"),
    ("\u05e9\u05dc\u05d5\u05dd ", "\u05e2\u05d5\u05dc\u05dd"),
    ("\u0645\u0631\u062d\u0628\u0627\n", "\u0628\u0643 \u200f."),
]


def like_llama(scheme, split=False):
    """BPE over letters with \u2581 for a space; ``scheme``: which texts begin with one."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    names = ["<unk>", "<pad>", "</s>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    names += sorted({letter for pair in PAIRS for text in pair for letter in text} - {" ", "\n"})
    pieces = [("\u2581", letter) for letter in "abwQxt"] + [("b", "e"), ("\u2581b", "e"), ("h", "e")]
    merged = ["".join(one) for one in pieces]
    vocabulary = {name: at for at, name in enumerate(dict.fromkeys([*names, *merged]))}
    backend = Tokenizer(BPE(vocabulary, pieces, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("pair", PAIRS)
def test_prompt_and_target_read_as_the_whole_text(scheme, pair):
    tokenizer = like_llama(scheme)
    assert marks_start(tokenizer)
    (made,) = Encoder(tokenizer, "causal_lm", 99).examples([Row(*pair)])
    assert made.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(made.input_ids[1:-1]) == "".join(pair)
    head = made.labels.count(IGNORE)
    assert made.input_ids[:head] == tokenizer(pair[0])["input_ids"]  # what generation is given
    whole = tokenizer("".join(pair))["input_ids"]
    if whole[:head] == made.input_ids[:head]:
        assert made.input_ids[:-1] == whole


@pytest.mark.parametrize("pair", PAIRS)
def test_a_byte_level_tokenizer_joins_as_it_always_did(pair):
    tokenizer = train_tokenizer(["".join(pair) for pair in PAIRS] * 3, 300)
    assert not marks_start(tokenizer)
    (made,) = Encoder(tokenizer, "causal_lm", 99).examples([Row(*pair)])
    apart = [tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in pair]
    assert made.input_ids == [*apart[0], *apart[1], tokenizer.eos_token_id]
    assert tokenizer.decode(made.input_ids[:-1]) == "".join(pair)


def test_what_a_template_writes_stays_special_at_the_joint():
    tokenizer = like_llama("first")
    prompt, target = (
        Template("{q}</s>", "prompt").render({"q": "a"}),
        Template("{a}</s>b", "target").render({"a": "b </s>"}),
    )
    (made,) = Encoder(tokenizer, "causal_lm", 99).examples([Row(prompt, target)])
    assert made.input_ids.count(tokenizer.eos_token_id) == 3  # each template's, and the end
    assert tokenizer.decode(made.input_ids[1:-1]) == "a</s>b </s></s>b"


def test_the_real_tokenizer_of_a_small_llama_reads_the_whole_text(real_data):
    folder = real_data / "weights" / "stories260K-hf"
    if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        pytest.skip("no tokenizer beside the weights")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt, target = "Once upon a time\n", "there was a little girl"
    (made,) = Encoder(tokenizer, "causal_lm", 99).examples([Row(prompt, target)])
    head = tokenizer(prompt)["input_ids"]
    assert made.input_ids[: len(head)] == head
    assert made.input_ids[:-1] == tokenizer(prompt + target)["input_ids"]


def test_references_and_completions_are_read_alike_behind_a_joint(load_base):
    writer = Writer(load_base().model, like_llama("first"), None, "causal_lm", 64)
    rows = [Row("Q: why\n", "because it is"), Row("Q: why ", "because")]
    assert [writer.text(ids) for ids in writer.encoder.targets(rows)] == ["because it is", "because"]
