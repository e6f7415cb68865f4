"""``loralab generate``: what runs write behind a prompt, or how they classify it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.cli.arguments import JSON, Arguments, Command, Flag
from loralab.errors import ConfigError


def run(arguments: Arguments) -> int:
    """One run after the other; those that share a base load it once."""
    if arguments.prompt is None:
        raise ConfigError("loralab generate needs --prompt TEXT")
    folders = [Path(word) for word in arguments.words if _names_folder(word)]
    if not folders:
        raise ConfigError("loralab generate needs the folder of a run; loralab ls shows which there are")
    options, seed = _options([word for word in arguments.words if not _names_folder(word)])
    from loralab.cli.terminal import messages_to_stderr

    messages_to_stderr()
    from loralab.artifacts.reopen import read_run

    for folder in folders:  # all of them before the first base is loaded
        read_run(folder)
    prompt = arguments.prompt.replace("\\n", "\n").replace("\\t", "\t")
    made = _made(folders, prompt, options, seed, arguments.base)
    print(json.dumps({"prompt": prompt, "runs": made}) if arguments.json else _render(made))
    return 0


def _names_folder(word: str) -> bool:
    """Whether it is the folder of a run, which may have ``=`` in its name, and no setting."""
    return "=" not in word or Path(word).is_dir()


def _made(folders: list[Path], prompt: str, options: Mapping[str, Any], seed: int, base: bool) -> list[dict[str, Any]]:
    from loralab.artifacts.reopen import open_run
    from loralab.artifacts.text import class_probabilities, completion
    from loralab.running.inputs import Inputs
    from loralab.training.trainer import quiet

    quiet()
    inputs, made = Inputs(), list[dict[str, Any]]()
    for place, folder in enumerate(folders):
        opened = open_run(folder, inputs)
        classifies = opened.spec.model.task == "sequence_classification"
        if classifies and options:
            raise ConfigError(f"{folder} classifies, and {next(iter(options))}= is of decoding; valid: no such setting")
        for adapted in (False, True) if base and place == 0 else (True,):
            asked = opened if adapted else opened.untrained()
            answer = (
                {"classes": class_probabilities(asked, prompt, adapted)}
                if classifies
                else {"text": completion(asked, prompt, options, seed, adapted)}
            )
            made.append({"run": str(folder) if adapted else "the base", **answer})
        opened.close()
        if opened.spec.adapter.changes_base:
            inputs.forget_base()
    return made


def _options(words: list[str]) -> tuple[dict[str, Any], int]:
    """Options of decoding and the seed. Raises ConfigError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        options: Any = OmegaConf.to_container(OmegaConf.from_dotlist(words))
    except (YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{' '.join(words)} cannot be read ({reason}); valid: as in top_p=0.9 do_sample=true"
        ) from error
    seed = options.pop("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ConfigError(f"seed={seed!r} is not a seed; valid: a whole number from 0 to {2**63 - 1}")
    return options, seed


def _render(made: list[dict[str, Any]]) -> str:
    """A paragraph a run, under its name where there are several."""
    parts = []
    for one in made:
        lines = (
            [f"{name}  {share:.4f}" for name, share in one["classes"].items()] if "classes" in one else [one["text"]]
        )
        parts.append("\n".join([*([f"== {one['run']}"] if len(made) > 1 else []), *lines]))
    return "\n\n".join(parts)


GENERATE = Command(
    name="generate",
    summary="text (or the classes) that the adapter of a run gives a prompt",
    about="Completes a prompt with the adapter of a run, greedily unless the run's data.generation or k=v say\n"
    "otherwise; a classifier gives the probabilities of its classes. In --prompt \\n and \\t mean newline and tab;\n"
    "special tokens in it are special, but not in a chat's turn or a text that is classified.",
    usage="RUN --prompt TEXT",
    examples={
        "loralab generate runs/train/TIME --prompt 'def add(a, b):'": "greedy, 64 new tokens",
        "loralab generate RUN RUN2 --base --prompt TEXT": "two adapters and the base side by side",
        "loralab generate RUN --prompt TEXT do_sample=true top_p=0.9 seed=1": "sampled; num_beams=4: beam search",
    },
    writes="nothing.",
    run=run,
    own_flags=(
        Flag(("--prompt",), "what is completed, or classified", "TEXT"),
        Flag(("--base",), "the base without adapter, beside the first run"),
        JSON,
    ),
)
