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
    folders = [Path(word) for word in arguments.words if "=" not in word]
    if not folders:
        raise ConfigError("loralab generate needs the folder of a run; loralab ls shows which there are")
    options, seed = _options([word for word in arguments.words if "=" in word])
    from loralab.cli.terminal import messages_to_stderr

    messages_to_stderr()
    from loralab.artifacts.reopen import read_run

    for folder in folders:  # all of them before the first base is loaded
        read_run(folder)
    prompt = arguments.prompt.replace("\\n", "\n").replace("\\t", "\t")
    made = _made(folders, prompt, options, seed, arguments.base)
    print(json.dumps({"prompt": prompt, "runs": made}) if arguments.json else _render(made))
    return 0


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
        if classifies and options and len(folders) == 1:
            raise ConfigError(f"{next(iter(options))} is of writing text, and {folder} classifies; valid: without it")
        for adapted in (False, True) if base and place == 0 else (True,):
            answer = (
                {"classes": class_probabilities(opened, prompt, adapted)}
                if classifies
                else {"text": completion(opened, prompt, options, seed, adapted)}
            )
            made.append({"run": str(folder) if adapted else "the base", **answer})
        opened.close()
        if opened.spec.adapter.changes_base:
            inputs.forget_base()
    return made


def _options(words: list[str]) -> tuple[dict[str, Any], int]:
    """Options of decoding and the seed. Raises ConfigError."""
    from omegaconf import OmegaConf

    options: Any = OmegaConf.to_container(OmegaConf.from_dotlist(words))
    seed = options.pop("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed={seed!r} is not a seed; valid: a whole number from 0")
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
    "otherwise; a classifier gives the probabilities of its classes. In --prompt \\n and \\t mean newline and tab.",
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
