"""Made-up sweeps over axes of numbers; none of the numbers is a result of loralab."""

import random
from itertools import product

from loralab.records import record


def write_grid(root, synthetic, axes, seeds=(0, 1), tune=(), lacking=lambda values, seed: None):
    """A sweep whose trials have the product of ``axes`` {setting: values}; ``tune``: settings among them that it tunes;
    ``lacking``: the status of a trial without a result, None for one that has it."""
    trials = []
    for values in product(*axes.values()):
        for seed in seeds:
            given = dict(zip(axes, values, strict=True))
            stored = synthetic("none", 2, seed)
            noise = random.Random(f"{given}{seed}")
            for key, value in given.items():
                group, _, name = key.partition(".")
                stored["config"][group][name] = value
            stored["metrics"] = {"val/loss": 2 + noise.random(), "test/loss": 2 + noise.random()}
            status = lacking(given, seed)
            stored.update({"status": status, "metrics": {}} if status else {})
            name = ",".join(f"{key}={value}" for key, value in given.items()) + f",seed={seed}"
            stored["trial"] = name
            record.write(root / name, stored)
            trials.append({"trial": name, "folder": name, "status": stored["status"]})
    about = {"tune": {key: list(axes[key]) for key in tune}} if tune else {}
    listed = {**{key: list(values) for key, values in axes.items()}, "seed": list(seeds)}
    record.write_sweep(root, {"name": "grid", "question": "?", "axes": listed, "trials": trials, **about})
    return root
