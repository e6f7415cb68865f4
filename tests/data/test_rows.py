import pytest

from loralab.data.base import Row
from loralab.data.fields import BadRow, Template, text_of
from loralab.data.rows import Record, RowSpec, split_off
from loralab.errors import ConfigError, DataError


def records(*fields):
    return [Record(each, f"t.jsonl:{number}") for number, each in enumerate(fields, 1)]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (r"{mr}\n", "name[X]\n"),
        (r"{mr}\tis {n}", "name[X]\tis 3"),
        ("{{{mr}}}", "{name[X]}"),
        ("{mr}\n", "name[X]\n"),
        ("no field", "no field"),
    ],
)
def test_a_template_fills_in_fields(template, text):
    assert Template(template, "prompt").render({"mr": "name[X]", "n": 3}) == text


def test_escapes_in_a_field_are_left_as_they_are():
    assert Template(r"{a}\n", "prompt").render({"a": r"C:\new"}) == "C:\\new\n"


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{}", "{a!r}", "{a:>3}", "{a", "a}"])
def test_a_template_that_reaches_into_objects_is_refused(template):
    with pytest.raises(ConfigError, match=r"data\.prompt.*written twice"):
        RowSpec(prompt=template, target="{b}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "{a}"}, "data.target is missing"),
        ({"prompt": "{a}", "target": "{b}", "text": "{c}"}, "exclude each other"),
        ({"label": "y"}, "needs data.text"),
        ({"text": "{a}", "labels": ["x", "y"]}, "data.label"),
        ({"text": "{a}", "label": "y", "labels": ["x", "x"]}, "twice"),
        ({"on_bad_row": "skpi"}, "did you mean skip"),
    ],
)
def test_a_contradictory_spec_is_refused_before_anything_is_read(options, message):
    with pytest.raises(ConfigError, match=message):
        RowSpec(**options)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "'ref' is null"),
        ([1], "'ref' is a list"),
        ({"a": 1}, "'ref' is an object"),
        (True, "true/false"),
        ("a\0b", "NUL"),
        ("\udc80", "UTF-8"),
        ("   ", "target is empty"),
        (float("nan"), "'ref' is nan, text or a finite number is wanted"),
        (float("-inf"), "'ref' is -inf"),
    ],
)
def test_a_bad_value_is_named_with_its_line_and_field(value, message):
    spec = RowSpec(prompt="{mr}", target="{ref}")
    with pytest.raises(DataError, match=rf"t\.jsonl:2: .*{message}"):
        spec.assemble("t", {"train": records({"mr": "a", "ref": "b"}, {"mr": "a", "ref": value})})


def test_a_missing_field_says_what_there_is():
    with pytest.raises(BadRow, match=r"'summary' is missing \(has: text, id\)"):
        text_of({"text": "a", "id": 1}, "summary")


def test_five_bad_rows_are_shown_and_all_counted():
    bad = records(*[{"mr": "a"}] * 7, {"mr": "a", "ref": "b"})
    with pytest.raises(DataError, match="7 of 8 rows") as caught:
        RowSpec(prompt="{mr}", target="{ref}").assemble("t", {"train": bad})
    assert str(caught.value).count("t.jsonl:") == 5


def test_bad_rows_are_skipped_counted_and_warned_of(caplog):
    spec = RowSpec(prompt="{mr}", target="{ref}", on_bad_row="skip")
    rows = records({"mr": "a", "ref": "b"}, {"mr": "a"}, {"mr": "c", "ref": "d"})
    splits = spec.assemble("t", {"train": rows, "validation": records({"mr": "e", "ref": "f"})})
    assert (len(splits.train), splits.skipped) == (2, 1)
    assert "1 of 3 rows are bad" in caplog.text


def test_a_split_without_a_good_row_is_an_error_even_when_skipping():
    spec = RowSpec(prompt="{mr}", target="{ref}", on_bad_row="skip")
    with pytest.raises(DataError, match="train split is empty: 2 rows read, 2 dropped"):
        spec.assemble("t", {"train": records({"mr": "a"}, {"mr": "b"})})


PAIR = {"mr": "a", "ref": "b"}, {"mr": "c", "ref": "d"}


@pytest.mark.parametrize("options", [{"prompt": "mr", "target": "ref"}, {"prompt": "{mr}", "target": "ref"}])
def test_the_bare_name_of_a_column_is_that_column(options):
    written = RowSpec(prompt="{mr}", target="{ref}").assemble("t", {"train": records(*PAIR)})
    assert RowSpec(**options).assemble("t", {"train": records(*PAIR)}).fingerprint == written.fingerprint


def test_a_bare_name_reaches_a_column_that_no_field_can_name():
    spec = RowSpec(text="a.b", label="{y}")
    rows = records({"a.b": "one", "y": 0}, {"a.b": "two", "y": 1})
    splits = spec.assemble("t", {"train": rows, "validation": rows})
    assert [(row.prompt, row.label) for row in splits.validation] == [("one", 0), ("two", 1)]


@pytest.mark.parametrize("key", ["prompt", "target"])
@pytest.mark.parametrize("text", ["rfe", "{{ref}}", "Answer:"])
def test_a_template_without_a_field_is_refused_with_the_columns_there_are(key, text):
    spec = RowSpec(**{"prompt": "{mr}", "target": "{ref}", key: text})
    with pytest.raises(ConfigError, match=rf"data\.{key}='{text}' has no {{field}}.*valid: mr, ref$"):
        spec.assemble("t", {"train": records(*PAIR)})


def test_an_empty_prompt_is_no_prompt():
    splits = RowSpec(prompt="", target="{ref}").assemble("t", {"train": records(*PAIR)})
    assert {row.prompt for row in [*splits.train, *splits.validation]} == {""}


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"text": "{mr}", "label": "y"}, [{"mr": "a", "y": 0}, {"mr": "a", "y": 1}]),
        ({"prompt": "{mr}", "target": "{ref}"}, [PAIR[0]] * 3),
        ({"target": "{ref}"}, [PAIR[0]] * 3),
        ({"text": "{ref}"}, [PAIR[0]] * 3),
    ],
    ids=["labels", "pairs", "targets", "documents"],
)
def test_training_rows_that_are_all_the_same_are_refused(options, rows, caplog):
    with pytest.raises(DataError, match=f"t: all {len(rows)} training rows hold the same input"):
        RowSpec(**options).assemble("t", {"train": records(*rows), "validation": records(*rows)})
    assert "are also training rows" not in caplog.text


def test_a_single_row_and_rows_of_one_prompt_are_trained(caplog):
    spec = RowSpec(prompt="{mr}", target="{ref}")
    spec.assemble("t", {"train": records(PAIR[0]), "validation": records(PAIR[1])})
    assert not caplog.records
    same = records({"mr": "a", "ref": "b"}, {"mr": "a", "ref": "c"})
    assert len(spec.assemble("t", {"train": same, "validation": records(PAIR[1])}).train) == 2
    assert "all 2 training rows have the same prompt ('a')" in caplog.text


def test_one_row_in_ten_is_held_out_and_equal_prompts_stay_together():
    rows = [Row(f"prompt {index // 3}", f"target {index}") for index in range(300)]
    train, validation = split_off(rows)
    assert len(validation) == 30
    assert {row.prompt for row in train}.isdisjoint(row.prompt for row in validation)
    assert split_off(rows[::-1])[1] == validation[::-1]


def test_two_rows_can_be_split_and_one_cannot():
    assert [len(part) for part in split_off([Row("a", "x"), Row("b", "y")])] == [1, 1]
    with pytest.raises(DataError, match="give a validation file"):
        split_off([Row("a", "x"), Row("a", "y")])


def test_overlap_of_training_and_validation_is_warned_of(caplog):
    spec = RowSpec(prompt="{mr}", target="{ref}")
    same, other = {"mr": "a", "ref": "b"}, {"mr": "c", "ref": "d"}
    spec.assemble("t", {"train": records(same), "validation": records(same, other)})
    assert "1 of 2 validation rows are also training rows" in caplog.text


def test_the_fingerprint_follows_the_rows_and_not_their_place():
    spec = RowSpec(prompt="{mr}", target="{ref}")
    rows = records({"mr": "a", "ref": "b"}, {"mr": "c", "ref": "d"})
    moved = [Record(row.fields, "elsewhere:1") for row in rows]
    one = spec.assemble("t", {"train": rows, "validation": rows})
    assert one.fingerprint == spec.assemble("u", {"train": moved, "validation": moved}).fingerprint
    assert one.fingerprint != spec.assemble("t", {"train": rows[::-1], "validation": rows}).fingerprint
    assert len(one.fingerprint) == 16
