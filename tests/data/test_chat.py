"""Conversations: the tokenizer's own template, the loss on the assistant's turns, whole turns cut from the left."""

import json

import pytest
from tokenizers import normalizers

from loralab.config.build import build
from loralab.config.compose import compose, plain
from loralab.data.chat import Chat
from loralab.data.encoding import IGNORE, encode
from loralab.data.preview import preview
from loralab.data.tokenizer import train_tokenizer
from loralab.errors import ConfigError, DataError

HEAD = "{% for m in messages %}<|{{ m['role'] }}|>\n"
PROMPT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
PLAIN = HEAD + "{{ m['content'] }}<|end|>\n{% endfor %}" + PROMPT
TAGGED = (
    HEAD + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>\n{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}" + PROMPT
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)


def chat(*turns):
    return [{"role": role, "content": text} for role, text in turns]


LONG = chat(
    *(("system", "Be brief."), ("user", "one"), ("assistant", "uno"), ("user", "two"), ("assistant", "dos")),
    *(("user", "three"), ("assistant", "tres")),
)


def tokenizer(template):
    made = train_tokenizer(["a"], vocab_size=258)
    made.chat_template = template
    return made


@pytest.fixture
def read(tmp_path):
    """Splits of rows that are objects, or lines as they are."""

    def make(rows, **options):
        path = tmp_path / "chats.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return Chat(train=str(path), validation=str(path), **options).splits()

    return make


def learnt(made, example):
    """The stretches of text that enter the loss."""
    parts = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label != IGNORE:
            assert label == token
            parts[-1].append(token)
        elif parts[-1]:
            parts.append([])
    return [made.decode(part) for part in parts if part]


@pytest.mark.parametrize("template", [PLAIN, TAGGED], ids=["grown", "tagged"])
def test_ids_are_the_templates_and_the_loss_is_on_the_assistant(read, template):
    made = tokenizer(template)
    (example,) = encode(read([{"messages": LONG}]), made, "causal_lm", 512).train
    assert example.input_ids == made.apply_chat_template(LONG, return_dict=True)["input_ids"]
    assert learnt(made, example) == ["uno<|end|>\n", "dos<|end|>\n", "tres<|end|>\n"]
    assert (example.target_tokens, example.truncated) == (3 * 8 + 3 + 3 + 4, False)


def test_sharegpt_is_the_same_conversation(read):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    theirs = [{"from": names[one["role"]], "value": one["content"]} for one in LONG]
    assert read([{"conversations": theirs}]).fingerprint == read([{"messages": LONG}]).fingerprint


def test_the_users_last_words_are_not_read_for_nothing_follows_them(read):
    more = [*LONG, {"role": "user", "content": "and four?"}]
    assert read([{"messages": more}]).train[0].prompt == read([{"messages": LONG}]).train[0].prompt


@pytest.mark.parametrize("template", [PLAIN, TAGGED], ids=["grown", "tagged"])
@pytest.mark.parametrize("kept", [5, 3])
def test_whole_turns_are_cut_from_the_left_and_the_systems_words_stay(read, template, kept):
    made = tokenizer(template)
    short = made.apply_chat_template([LONG[0], *LONG[-kept + 1 :]], return_dict=True)["input_ids"]
    encoded = encode(read([{"messages": LONG}]), made, "causal_lm", len(short) + 3)
    assert encoded.train[0].input_ids == short
    assert encoded.truncated == 2  # one in each split
    assert len(learnt(made, encoded.train[0])) == (kept - 1) // 2


def test_of_one_exchange_that_is_too_long_the_first_tokens_go(read):
    made = tokenizer(PLAIN)
    row = chat(("user", "x" * 80), ("assistant", "yes"))
    example = encode(read([{"messages": row}]), made, "causal_lm", 40).train[0]
    assert example.input_ids == made.apply_chat_template(row, return_dict=True)["input_ids"][-40:]
    assert learnt(made, example) == ["yes<|end|>\n"]
    assert example.truncated


def test_real_conversations_agree_with_the_template_called_plainly(real_data):
    path = real_data / "glaive_toolcall_en_demo" / "train.jsonl.gz"
    grown, tagged = tokenizer(PLAIN), tokenizer(TAGGED)
    splits = Chat(train=str(path), limit=60).splits()
    one, other = (encode(splits, made, "causal_lm", 100_000) for made in (grown, tagged))
    assert list(one.train) == list(other.train)
    for row, example in zip(splits.train, one.train, strict=True):
        messages = json.loads(row.prompt)
        made = tagged.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert example.input_ids == made["input_ids"]
        assert [label != IGNORE for label in example.labels] == [bool(own) for own in made["assistant_masks"]]
        own = [turn["content"] + "<|end|>\n" for turn in messages if turn["role"] == "assistant"]
        assert "".join(learnt(grown, example)) == "".join(own)
    cut = encode(splits, grown, "causal_lm", 1024)
    assert 0 < cut.truncated < 66
    assert all(len(example.input_ids) <= 1024 and example.target_tokens for example in cut.train)


BAD = {
    "no assistant": ({"messages": chat(("user", "a"))}, "no turn of the assistant among 1 messages"),
    "role": ({"messages": chat(("asistant", "a"))}, "message 1 has the role 'asistant'; did you mean assistant"),
    "null": ({"messages": [{"role": "assistant", "content": None}]}, r"content of message 1 \(assistant\) is null"),
    "parts": ({"messages": [{"role": "assistant", "content": [{}]}]}, "is a list, text is wanted"),
    "number": ({"messages": [{"role": "assistant", "content": 5}]}, "is a number, text is wanted"),
    "empty": ({"messages": chat(("assistant", " "))}, r"content of message 1 \(assistant\) is empty"),
    "call": ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "holds 'tool_calls'"),
    "text": ({"messages": "hello"}, "field 'messages' is str, a list of messages is wanted"),
    "field": ({"message": []}, r"field 'messages' is missing \(has: message\)"),
    "JSON": ('{"messages": ', "not JSON"),
}
GOOD = {"messages": chat(("user", "a"), ("assistant", "b"))}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_or_left_out(read, case):
    row, message = BAD[case]
    with pytest.raises(DataError, match=rf"chats\.jsonl:2: .*{message}"):
        read([GOOD, row])
    splits = read([GOOD, row], on_bad_row="skip")
    assert (len(splits.train), splits.skipped) == (1, 2)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, LONG, "has no chat template, by which data=chat"),
        (FORGETFUL, LONG, r"chats\.jsonl:1: .*before message 3 otherwise .*generation"),
        (STRICT, LONG, r"chats\.jsonl:1: the tokenizer's chat template refuses the messages: no system"),
        (PLAIN, chat(("user", "a</s>"), ("assistant", "b")), r"chats\.jsonl:1: message 1 quotes the special token"),
    ],
    ids=["no template", "forgetful", "strict", "quoted"],
)
def test_what_a_template_cannot_write_is_refused(read, template, messages, message):
    splits = read([{"messages": messages}])
    with pytest.raises(DataError, match=message):
        encode(splits, tokenizer(template), "causal_lm", 512)


def test_a_mask_that_runs_on_into_the_users_turns_is_refused(read):
    """transformers' does where a turn's last letter has no token; a turn found by its prefix ends where it ends."""
    kept, lossy = tokenizer(PLAIN), tokenizer(TAGGED)
    for one in (kept, lossy):
        one.backend_tokenizer.normalizer = normalizers.Replace("\n", "")
    splits = read([{"messages": LONG}])
    assert learnt(kept, encode(splits, kept, "causal_lm", 512).train[0]) == ["uno<|end|>", "dos<|end|>", "tres<|end|>"]
    with pytest.raises(DataError, match=r"chats\.jsonl:1: .* tags mark 1 stretches of tokens, .* 3 turns"):
        encode(splits, lossy, "causal_lm", 512)


def test_other_tasks_and_generated_rows_are_refused(read):
    with pytest.raises(ConfigError, match="holds conversations"):
        encode(read([GOOD]), tokenizer(PLAIN), "seq2seq_lm", 64)
    with pytest.raises(ConfigError, match="generate_rows=3"):
        Chat(train="x.jsonl", generate_rows=3)


def test_the_preview_says_what_is_learnt(read):
    lines = preview(encode(read([GOOD]), tokenizer(PLAIN), "causal_lm", 64), tokenizer(PLAIN)).split("\n")
    assert lines[0].endswith("loss on 9 of the assistant")
    assert lines[2] == "  target b<|end|>\\n"


def test_the_yaml_is_the_spec():
    assert build(plain(compose(["data=chat"]))["data"], "data") == Chat()
