"""``loralab subspace``: the directions of a run's updates, and how many of them another run shares."""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.analysis import subspaces
from loralab.analysis.subspace_files import DIRECTIONS, INTRUDER_COSINE, INTRUDERS_OF, SCHEMA, fingerprint
from loralab.analysis.updates import OpenUpdates, Update, chosen, open_updates, types
from loralab.artifacts.reopen import read_run
from loralab.errors import ArtifactError
from loralab.running.inputs import Inputs

log = logging.getLogger(__name__)

LARGE = 4096 * 4096  # weights of a matrix from which on its decomposition takes minutes
DIGITS = 5  # of phi
AVERAGED = (  # what a summary takes the mean, the least and the most of
    *("frobenius", "relative_frobenius", "spectral", "relative_spectral", "rank", "effective_rank", "stable_rank"),
    *("projected", "projected_own", "projected_random", "amplification", "intruders"),
)
DEFINITIONS = {
    "singular_values": "of Delta W, those that are not 0 up to the rounding of float32",
    "effective_rank": "exponential of the entropy of the singular values over their sum (Roy and Vetterli 2007)",
    "stable_rank": "||Delta W||_F^2 / ||Delta W||_2^2",
    "relative_frobenius": "||Delta W||_F / ||W||_F; relative_spectral: the same of the spectral norms",
    "projected": "||U^T W V||_F, U and V the first `directions` singular vectors of Delta W (LoRA, table 7); "
    "projected_own: those of W; projected_random: root of the mean square over random orthonormal ones",
    "amplification": "||Delta W||_F / projected (LoRA, section 7.3)",
    "intruders": f"of the first {INTRUDERS_OF} left singular vectors of W + Delta W those whose largest "
    f"|cosine| with a left singular vector of W is below {INTRUDER_COSINE} (arXiv 2410.21228); cosines: "
    "these largest ones",
    "undefined": "null where Delta W is 0, or nothing of W lies along its directions",
}
PAIR_DEFINITIONS = {
    "phi": "[i - 1][j - 1]: ||U_i^T V_j||_F^2 / min(i, j), i directions of the first run, j of the second (LoRA, "
    "equation 4); of A the right singular vectors, of B the left, of delta_left and delta_right those of Delta W",
    "A_start": "the same of A as it was drawn: in runs of one seed the smaller rank's rows are among the larger one's",
    "n": "dimensions of the space; two random matrices give max(i, j) / n on average",
}


def measure(folder: Path, inputs: Inputs, pattern: str | None = None) -> dict[str, Any]:
    """The figures of the run's updates, layer by layer and by type of layer, as JSON has them.

    ``pattern``: which layers; None: all. Raises what ``open_updates`` and ``chosen`` raise.
    """
    opened = open_updates(folder, inputs)
    try:
        names = chosen(list(opened.sources), pattern)
        _mention_time([opened.sources[name].shape for name in names])
        kinds = types(list(opened.sources))
        layers = {name: {"type": kinds[name], **layer_figures(opened.read(name))} for name in names}
    finally:
        opened.run.close()
    return {
        **{"schema": SCHEMA, "run": _about(opened), "pattern": pattern, "definitions": DEFINITIONS},
        **{"types": _by_type(layers, _extremes), "layers": layers},
    }


def layer_figures(update: Update) -> dict[str, Any]:
    """Spectrum, norms, amplification and intruders of one update, as JSON has them: None for what is undefined."""
    weight, found = update.weight, update.spectrum()
    own_left, own_values, _ = torch.linalg.svd(weight, full_matrices=False)
    norm, own_norm = found.frobenius, float(torch.linalg.matrix_norm(weight.double()))
    own_spectral = float(own_values[0])
    directions = min(update.r or DIRECTIONS, found.rank)
    projected = subspaces.projected(weight, found.left[:, :directions], found.right[:, :directions])
    tuned = torch.linalg.svd(weight + update.matrix(), full_matrices=False)[0]
    cosines = subspaces.largest_cosines(tuned[:, :INTRUDERS_OF], own_left)
    some = directions > 0
    return {
        "shape": list(weight.shape),
        "r": update.r,
        "rank": found.rank,
        "singular_values": [_rounded(value) for value in found.values.tolist()],
        "effective_rank": subspaces.effective_rank(found.values),
        "stable_rank": subspaces.stable_rank(found.values),
        "frobenius": norm,
        "spectral": found.spectral,
        "weight_frobenius": own_norm,
        "weight_spectral": own_spectral,
        "relative_frobenius": norm / own_norm if own_norm else None,
        "relative_spectral": found.spectral / own_spectral if own_spectral else None,
        "directions": directions,
        "projected": projected if some else None,
        "projected_own": float(own_values[:directions].square().sum().sqrt()) if some else None,
        "projected_random": subspaces.projected_at_random(own_norm, directions, _shape(weight)) if some else None,
        "amplification": norm / projected if some and projected else None,
        "intruders": int((cosines < INTRUDER_COSINE).sum()),
        "cosines": [round(cosine, DIGITS) for cosine in cosines.tolist()],
    }


def compare(folder: Path, other: Path, inputs: Inputs, pattern: str | None = None) -> dict[str, Any]:
    """phi of the updates of two runs over one base, layer by layer and by type of layer, as JSON has them.

    Raises ArtifactError where the bases differ or no layer is adapted by both, and what ``measure`` raises.
    """
    _check_one_base(folder, other)
    first = open_updates(folder, inputs)
    try:
        second = open_updates(other, inputs)
        try:
            return {"schema": SCHEMA, "pattern": pattern, **_compared(first, second, pattern)}
        finally:
            second.run.close()
    finally:
        first.run.close()


def _compared(first: OpenUpdates, second: OpenUpdates, pattern: str | None) -> dict[str, Any]:
    both = [name for name in first.sources if name in second.sources]
    if not both:
        raise ArtifactError(f"{first.run.folder} and {second.run.folder} adapt no layer in common; valid: runs that do")
    names, kinds = chosen(both, pattern), types(both)
    layers = {name: {"type": kinds[name], **_similarities(first.read(name), second.read(name))} for name in names}
    pair = (first, second)
    return {
        **{"runs": [_about(one) for one in pair], "definitions": PAIR_DEFINITIONS},
        "only_in": [[name for name in one.sources if name not in both] for one in pair],
        **{"types": _by_type(layers, _overlap), "layers": layers},
    }


def _similarities(first: Update, second: Update) -> dict[str, Any]:
    """{A, A_start, B, delta_left, delta_right: {n, phi}}; without those that one of the two lacks, or that are 0."""
    ours, theirs = _directions(first), _directions(second)
    shared = {what: (ours[what], theirs[what]) for what in ours if what in theirs}
    grids = {
        what: {"n": len(u), "phi": [[round(value, DIGITS) for value in row] for row in grid.tolist()]}
        for what, (u, v) in shared.items()
        for grid in [subspaces.similarity(u, v)]
    }
    return {"shape": list(first.weight.shape), **grids}


def _directions(update: Update) -> dict[str, Tensor]:
    """Singular vectors as columns, those of values other than 0; of Delta W as many as the method's r."""
    delta = update.spectrum()
    count = update.r or DIRECTIONS
    found = {"delta_left": delta.left[:, :count], "delta_right": delta.right[:, :count]}
    factors = {"A": update.a, "A_start": update.start, "B": update.b}
    spectra = {what: subspaces.spectrum(factor.double()) for what, factor in factors.items() if factor is not None}
    found = {**{what: one.left if what == "B" else one.right for what, one in spectra.items()}, **found}
    return {what: vectors for what, vectors in found.items() if vectors.shape[1]}


def _check_one_base(folder: Path, other: Path) -> None:
    """Raises ArtifactError where the two runs were trained on different weights."""
    one, two = read_run(folder), read_run(other)
    prints = [record["base"]["fingerprint"] for record in (one, two)]
    same = prints[0] == prints[1] if None not in prints else one["config"]["model"] == two["config"]["model"]
    if not same:
        names = [
            f"{record['base']['name']} ({str(mark)[:12]})" for record, mark in zip((one, two), prints, strict=True)
        ]
        raise ArtifactError(
            f"{folder} is of the base {names[0]}, {other} of {names[1]}: directions of different weights do not "
            "compare; valid: two runs over one base"
        )


def _by_type(layers: Mapping[str, Mapping[str, Any]], summary: Any) -> dict[str, Any]:
    """{type of layer: {layers: how many, ...what ``summary`` gives of them}}."""
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, figures in layers.items():
        groups.setdefault(str(figures["type"]), {})[name] = figures
    return {kind: {"layers": len(group), **summary(group)} for kind, group in groups.items()}


def _extremes(group: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{figure: {mean, least, most, of: how many}} over the layers where it is defined, least and most with their layer;
    None where it is defined nowhere."""
    result: dict[str, Any] = {}
    for figure in AVERAGED:
        values = {name: float(one[figure]) for name, one in group.items() if one[figure] is not None}
        ordered = sorted(values, key=lambda name: values[name])
        ends = {"least": ordered[:1], "most": ordered[-1:]}
        result[figure] = (
            {
                "mean": math.fsum(values.values()) / len(values),
                **{end: {"value": values[name], "layer": name} for end, names in ends.items() for name in names},
                "of": len(values),
            }
            if values
            else None
        )
    return result


def _overlap(group: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{A, B, ...: [{i, j, phi, random, of}]}: means over the layers at i = j of the powers of 2, and at the end."""
    matrices = dict.fromkeys(what for one in group.values() for what in one if what not in ("type", "shape"))
    return {what: _along([one[what] for one in group.values() if what in one]) for what in matrices}


def _along(grids: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows, columns = (min(size) for size in zip(*((len(g["phi"]), len(g["phi"][0])) for g in grids), strict=True))
    steps = [2**power for power in range(min(rows, columns).bit_length())]
    points = dict.fromkeys([*((step, step) for step in steps), (rows, columns)])
    return [
        {
            **{"i": i, "j": j, "phi": math.fsum(grid["phi"][i - 1][j - 1] for grid in grids) / len(grids)},
            "random": math.fsum(subspaces.similarity_at_random(i, j, grid["n"]) for grid in grids) / len(grids),
            "of": len(grids),
        }
        for i, j in points
    ]


def _about(opened: OpenUpdates) -> dict[str, Any]:
    record, folder = opened.run.record, opened.run.folder
    adapter = opened.run.spec.adapter
    return {
        **{"folder": folder.resolve().name, "trial": record["trial"], "seed": record["seed"]},
        **{"method": adapter.method, "base": record["base"]["name"], "result": fingerprint(folder)},
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _shape(weight: Tensor) -> tuple[int, int]:
    return len(weight), weight.shape[1]


def _mention_time(shapes: Iterable[tuple[int, int]]) -> None:
    """Logs how long the decompositions will take where one of the matrices is large; a small one is timed for it."""
    shapes = list(shapes)
    if all(rows * columns <= LARGE for rows, columns in shapes):
        return
    side = 768
    begun = time.perf_counter()
    torch.linalg.svd(torch.randn(side, side, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    each = (time.perf_counter() - begun) / side**3
    minutes = 2 * each * sum(rows * columns * min(rows, columns) for rows, columns in shapes) / 60
    largest = max(shapes, key=math.prod)
    log.warning(
        "singular values of W and W + Delta W of %d layers, up to %d x %d: about %d min; --layers PATTERN takes fewer",
        *(len(shapes), *largest, math.ceil(minutes)),
    )
