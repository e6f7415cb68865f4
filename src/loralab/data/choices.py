"""The answers that a row of multiple choice can have."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.data.fields import BadRow, field_of, text_of, typename


def choices_of(fields: Mapping[str, Any], choices: Sequence[str] | str | None, target: str) -> tuple[str, ...]:
    """The answers of a record, each with the white space that is around its target; empty where ``choices`` is None.

    ``choices``: the answers, or the name of the column that lists them. Raises BadRow where the target is none of them.
    """
    if choices is None:
        return ()
    answer = target.strip()
    answers = [text.strip() for text in (_column_choices(fields, choices) if isinstance(choices, str) else choices)]
    if answer not in answers:
        raise BadRow(f"the target {answer!r} is none of the choices ({', '.join(map(repr, answers))})")
    start = target.index(answer)
    before, after = target[:start], target[start + len(answer) :]
    return tuple(target if text == answer else before + text + after for text in answers)


def _column_choices(fields: Mapping[str, Any], name: str) -> list[str]:
    value = field_of(fields, name)
    if not isinstance(value, list | tuple):
        raise BadRow(f"field {name!r} is {typename(value)}, a list of answers is wanted")
    answers = [text_of({name: item}, name) for item in value]
    if problem := wrong_choices(answers):
        raise BadRow(f"field {name!r} {problem}")
    return answers


def wrong_choices(answers: Sequence[str]) -> str:
    """What is wrong with ``answers`` (fewer than two, an empty one, a repeated one); empty where nothing is."""
    known = {text.strip() for text in answers}
    if len(answers) < 2:
        return f"holds {len(answers)} answer{'s' * (len(answers) != 1)}, which is no choice"
    if "" in known:
        return "holds an empty answer"
    return "holds an answer twice" if len(known) < len(answers) else ""
