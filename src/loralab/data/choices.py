"""The answers that a row of multiple choice can have."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.data.fields import BadRow, field_of, text_of, typename


def choices_of(fields: Mapping[str, Any], choices: Sequence[str] | str | None, target: str) -> tuple[str, ...]:
    """A record's choices, with the white space around its target, which is one of them; none where None. ``choices``:
    the answers, or the name of the column that lists them. Raises BadRow."""
    if choices is None:
        return ()
    given = _listed(fields, choices) if isinstance(choices, str) else list(choices)
    answer = target.strip()
    answers = [one.strip() for one in given]
    if answer not in answers:
        raise BadRow(f"the target {answer!r} is none of the choices ({', '.join(map(repr, answers))})")
    start = target.index(answer)
    before, after = target[:start], target[start + len(answer) :]
    return tuple(target if one == answer else before + one + after for one in answers)


def _listed(fields: Mapping[str, Any], name: str) -> list[str]:
    value = field_of(fields, name)
    if not isinstance(value, list | tuple):
        raise BadRow(f"field {name!r} is {typename(value)}, a list of answers is wanted")
    answers = [text_of({name: one}, name) for one in value]
    if problem := wrong_choices(answers):
        raise BadRow(f"field {name!r} {problem}")
    return answers


def wrong_choices(answers: Sequence[str]) -> str:
    """Why ``answers`` are no choice; empty where they are."""
    known = {one.strip() for one in answers}
    if len(answers) < 2:
        return f"holds {len(answers)} answer{'s' * (len(answers) != 1)}, which is no choice"
    if "" in known:
        return "holds an empty answer"
    return "holds an answer twice" if len(known) < len(answers) else ""
