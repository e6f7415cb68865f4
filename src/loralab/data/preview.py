"""What the model is shown of a data set: its first training rows in words, so that a wrong template is seen."""

from typing import Any

from loralab.data.encoding import IGNORE, Blocks, Encoded

WIDTH = 160  # characters shown of a prompt or a target


def preview(encoded: Encoded, tokenizer: Any, rows: int = 2) -> str:
    """The first training rows as they are encoded: special tokens and line breaks visible, the target apart."""
    unit = "block" if isinstance(encoded.train, Blocks) else "row"
    lines = []
    for index, example in enumerate(encoded.train[:rows]):
        where = encoded.splits.train[index].where if unit == "row" else ""
        lines.append(
            f"training {unit} {index + 1}{where and f' ({where})'}: {len(example.input_ids)} tokens, "
            f"loss on {example.target_tokens}{_end(encoded, index, tokenizer)}"
            f"{', cut to model.max_length' * example.truncated}"
        )
        prompt, target = decoded(encoded, index, tokenizer)
        lines += [f"  {name} {shown(text)}" for name, text in (("prompt", prompt), ("target", target)) if text]
    return "\n".join(lines)


def _end(encoded: Encoded, index: int, tokenizer: Any) -> str:
    """The words about the end of a target: learnt, cut off, or none (classification)."""
    if encoded.task == "sequence_classification":
        return ""
    if isinstance(encoded.train, Blocks):
        return f", the ends {tokenizer.eos_token} of documents among them"
    if encoded.splits.kind == "chat":
        return " of the assistant"
    ended = tokenizer.eos_token_id in encoded.train[index].labels
    return f", the end {tokenizer.eos_token} among them" if ended else f", the end {tokenizer.eos_token} cut off"


def decoded(encoded: Encoded, index: int, tokenizer: Any) -> tuple[str, str]:
    """(prompt, target) of a training row, from its token ids."""

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    example = encoded.train[index]
    if encoded.task == "sequence_classification":
        if encoded.splits.kind == "scores":
            return text(example.input_ids), f"score {example.labels[0]:g}"
        return text(example.input_ids), f"class {example.labels[0]} ({encoded.splits.train[index].target})"
    if encoded.task == "seq2seq_lm":
        return text(example.input_ids), text(example.labels)
    head = next((place for place, label in enumerate(example.labels) if label != IGNORE), len(example.labels))
    whole, prompt = text(example.input_ids), text(example.input_ids[:head])
    # decoded alone, a SentencePiece target would lack its first space
    return prompt, whole[len(prompt) :] if whole.startswith(prompt) else text(example.input_ids[head:])


def shown(text: str) -> str:
    """One line: what is not printable is escaped (and so are backslashes), the middle of a long text left out."""
    line = "".join(
        letter if letter.isprintable() and letter != "\\" else letter.encode("unicode_escape").decode()
        for letter in text
    )
    return line if len(line) <= WIDTH else f"{line[: WIDTH // 2]} [...] {line[-WIDTH // 2 :]}"
