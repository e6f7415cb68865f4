"""Class names, numbers and scores in a label column."""

import json

import pytest

from loralab.cli.main import run
from loralab.data.files import Files
from loralab.data.rows import Record, RowSpec
from loralab.errors import ConfigError, DataError


def records(*fields):
    return [Record(each, f"t.jsonl:{number}") for number, each in enumerate(fields, 1)]


def labelled(*values):
    return records(*[{"text": f"text {index}", "y": value} for index, value in enumerate(values)])


def classify(train, **options):
    return RowSpec(text="{text}", label="y", **options).assemble("t", {"train": train, "validation": train})


def test_labels_are_inferred_in_order():
    assert classify(labelled("pos", "neg", "pos")).labels == ["neg", "pos"]
    assert classify(labelled(10, 9, 2)).labels == ["2", "9", "10"]
    assert classify(labelled("10", "9", "2")).labels == ["2", "9", "10"]


def test_labels_that_are_given_keep_their_order_and_name_numbers():
    splits = classify(labelled("pos", 0, "1"), labels=["neg", "pos"])
    assert [row.label for row in splits.train] == [1, 0, 1]
    assert [row.target for row in splits.train] == ["pos", "neg", "pos"]
    assert splits.kind == "labels"


@pytest.mark.parametrize("value", ["pso", 2, -1, "-1", "²"])
def test_a_label_out_of_range_or_unknown_is_named(value):
    with pytest.raises(DataError, match=rf"t\.jsonl:1: field 'y' is .*{value}.*not one of the 2 labels \(neg, pos\)"):
        classify(labelled(value), labels=["neg", "pos"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\u200b", None, True, "", ["a"]])
def test_a_label_of_another_type_is_refused(value):
    with pytest.raises(DataError, match="a label is a name or a whole number"):
        classify(labelled(value), labels=["neg", "pos"])


@pytest.mark.parametrize(("limit", "warned"), [(2, True), (3, False)])
def test_a_single_class_is_warned_of_also_where_the_limit_left_it(caplog, limit, warned):
    classify(labelled("pos", "pos", "neg"), limit=limit)
    assert ("every training row has the label 'pos'" in caplog.text) == warned


def test_a_name_wins_over_a_number():
    assert [row.label for row in classify(labelled("1", "0"), labels=["1", "0"]).train] == [0, 1]


def files(folder, train, validation, ending="jsonl", **options):
    """A spec over two files of labels."""
    paths = {}
    for split, values in (("train", train), ("validation", validation)):
        path = folder / f"{split}.{ending}"
        if ending == "jsonl":
            lines = [f'{{"t": "text {place}", "y": {value}}}' for place, value in enumerate(values)]
        else:
            lines = ["t,y", *(f"text {place},{value}" for place, value in enumerate(values))]
        path.write_text("\n".join(lines) + "\n")
        paths[split] = str(path)
    return Files(**paths, text="{t}", label="y", **options)


@pytest.mark.parametrize(("ending", "line"), [("jsonl", 1), ("csv", 2)])
def test_a_number_that_training_does_not_have_is_no_position(tmp_path, ending, line):
    spec = files(tmp_path, [1, 2, 3, 1], [0, 2], ending)
    with pytest.raises(
        DataError, match=rf"validation\.{ending}:{line}: field 'y' is '0', not one of the 3 labels of the"
    ):
        spec.splits()


def test_a_number_among_names_that_were_inferred_is_no_position(tmp_path):
    spec = files(tmp_path, ['"pos"', '"neg"', '"pos"'], [0, '"neg"'])
    with pytest.raises(DataError, match=r"validation\.jsonl:1: field 'y' is '0', not one .* \(neg, pos\)"):
        spec.splits()


def test_a_number_is_no_position_where_a_given_name_is_a_number():
    with pytest.raises(DataError, match=r"t\.jsonl:1: field 'y' is '0', not one of the 3 labels \(1, 2, 3\)"):
        classify(labelled(0, 1), labels=["1", "2", "3"])


def test_an_unknown_label_ends_the_command_with_the_code_of_data(tmp_path, tiny_arguments, capsys):
    spec = files(tmp_path, [1, 2, 3, 1], [0, 2])
    words = [word for word in tiny_arguments if not word.startswith(("data.", "adapter"))]
    given = [f"data.train={spec.train}", f"data.validation={spec.validation}", "data.text='{t}'", "data.label=y"]
    where = f"hydra.run.dir={tmp_path}"
    assert run(["train", *words, *given, where, "model.task=sequence_classification"]) == 3
    assert "validation.jsonl:1: field 'y' is '0', not one of the 3 labels of the training rows (1, 2, 3)" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("other", [" pos", "pos ", "pos\u00a0", "\ufeffpos", "\tpos\r", "pos\u200f", "\u200bpos"])
def test_space_around_a_name_makes_no_class(other):
    splits = classify(labelled("pos", "neg", other, "neg "))
    assert splits.labels == ["neg", "pos"]
    assert [row.label for row in splits.train] == [1, 0, 1, 0]


def test_two_forms_of_one_letter_are_one_class():
    assert classify(labelled("caf\u00e9", "cafe\u0301", "tea")).labels == ["caf\u00e9", "tea"]


def test_names_that_differ_in_their_case_are_named(caplog):
    assert classify(labelled("Pos", "pos", "neg")).labels == ["Pos", "neg", "pos"]
    assert "'Pos' and 'pos' are classes of their own" in caplog.text


def test_space_in_the_names_that_are_given_is_none_of_theirs():
    assert [row.label for row in classify(labelled("pos", " neg"), labels=["neg ", " pos"]).train] == [1, 0]
    with pytest.raises(ConfigError, match="twice"):
        RowSpec(text="{t}", label="y", labels=["pos", "pos "])


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_whole_number_is_one_class_however_it_is_written(tmp_path, ending):
    splits = files(tmp_path, ["1.0", "2", "3.0", "2.0"], ["1", "3"], ending).splits()
    assert splits.labels == ["1", "2", "3"]
    assert [row.label for row in splits.validation] == [0, 2]


@pytest.mark.parametrize(("ending", "line"), [("jsonl", 2), ("csv", 3)])
def test_a_fraction_is_no_class_in_either_format(tmp_path, ending, line):
    spec = files(tmp_path, ["1.0", "2.25", "3.5"], ["2.25"], ending)
    with pytest.raises(
        DataError, match=rf"train\.{ending}:{line}: field 'y' is 2\.25, a fraction.*model\.num_labels=1"
    ):
        spec.splits()


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_fractions_that_are_named_are_classes(tmp_path, ending):
    splits = files(tmp_path, ["1.10", "1.1", "2"], ["1.10"], ending, labels=["1.1", "1.10", "2"]).splits()
    assert [row.target for row in splits.train] == ["1.10", "1.1", "2"]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_scores_are_read_alike_from_both_formats(tmp_path, ending):
    splits = files(tmp_path, ["1.0", "2.25", "-3"], ["4.75", "0"], ending).as_scores().splits()
    assert (splits.kind, splits.labels) == ("scores", [])
    assert [row.label for row in splits.train + splits.validation] == [1.0, 2.25, -3.0, 4.75, 0.0]


@pytest.mark.parametrize("value", ['"good"', '"nan"', "NaN", "1e999", "null", "true"])
def test_a_score_that_is_no_number_is_named(tmp_path, value):
    with pytest.raises(DataError, match=r"validation\.jsonl:2: field 'y' is "):
        files(tmp_path, ["1.0", "2.25"], ["1", value]).as_scores().splits()


@pytest.mark.parametrize(("count", "warned"), [(12, True), (9, False)])
def test_many_classes_of_one_row_each_are_remarked(caplog, count, warned):
    classify(labelled(*range(count), 0))
    assert ("classes have one training row each" in caplog.text) == warned


def test_numbers_stay_as_they_are_written(tmp_path):
    path = tmp_path / "n.jsonl"
    numbers = ["1.10", "0.00001", "-0", "1e5", "123456789012345678901234567890", "2.50"]
    path.write_text("".join(f'{{"q": {number}, "a": {json.dumps(number)}}}\n' for number in numbers))
    splits = Files(train=str(path), validation=str(path), prompt="{q}", target="{a}").splits()
    assert [row.prompt for row in splits.train] == numbers
