"""The tokenizer of the shipped base: byte-level BPE over Python source.

``python -m loralab.data.tokenizer OUT_DIR --vocab-size 4096`` trains one on python_source.
"""

import argparse
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

END, PAD = "</s>", "<pad>"

# A line break keeps the indentation that follows it, a word the one space, dot or underscore before it;
# digits come in threes. A line break never joins the punctuation before it: the quotes that close a
# docstring are then the same token in the middle of a file and at the end of a target.
SPLIT = (
    r"(?:\r?\n)+[ \t]*"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|[ \t]+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> Any:
    """A PreTrainedTokenizerFast that gives back any text exactly; no bos, ``</s>`` ends, ``<pad>`` pads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def bytes_per_token(tokenizer: Any, texts: list[str]) -> float:
    """UTF-8 bytes over tokens."""
    tokens = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    return sum(len(text.encode()) for text in texts) / tokens


def main() -> None:
    """Train on the training files of python_source, save, and say how well it packs the validation files."""
    from loralab.data.source import PythonSource

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="train the byte-level BPE tokenizer of the shipped base")
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--max-megabytes", type=float, default=40.0, help="of training text, 1e6 bytes")
    parser.add_argument(
        "--packages", nargs="*", default=[], help="as data.packages: none for the standard library alone"
    )
    arguments = parser.parse_args()
    splits = PythonSource(packages=arguments.packages, max_megabytes=arguments.max_megabytes).splits()
    tokenizer = train_tokenizer((row.target for row in splits.train), arguments.vocab_size)
    tokenizer.save_pretrained(arguments.out)
    for name in ("validation", "test"):
        rate = bytes_per_token(tokenizer, [row.target for row in splits[name]])
        log.info("%s: %.3f bytes per token", name, rate)


if __name__ == "__main__":
    main()
