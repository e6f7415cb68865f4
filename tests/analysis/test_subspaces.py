"""Spectra and subspaces of made-up matrices beside numpy's and scipy's decompositions of the whole of them."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.stats import entropy, ortho_group

from loralab.analysis import subspace_files, subspaces
from loralab.analysis.results import read_results
from loralab.analysis.subspace_runs import layer_figures
from loralab.analysis.updates import Update, types


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(n, k, seed):
    return torch.linalg.qr(drawn(n, k, seed=seed).double()).Q


@pytest.mark.parametrize(("out", "r", "within"), [(20, 3, 14), (6, 9, 14), (14, 9, 6)])
def test_the_spectrum_of_a_product_is_that_of_the_whole_matrix(out, r, within):
    left, right = drawn(out, r), drawn(r, within, seed=1)
    found = subspaces.product_spectrum(left, right)
    u, s, vh = np.linalg.svd(left.double().numpy() @ right.double().numpy())
    rank = min(out, r, within)
    assert found.rank == rank
    assert found.values.numpy() == pytest.approx(s[:rank], rel=1e-12)
    assert (found.left.mT @ torch.tensor(u[:, :rank])).abs().numpy() == pytest.approx(np.eye(rank), abs=1e-10)
    assert (found.right.mT @ torch.tensor(vh[:rank].T)).abs().numpy() == pytest.approx(np.eye(rank), abs=1e-10)
    assert (found.frobenius, found.spectral) == pytest.approx((np.linalg.norm(s), s[0]), rel=1e-12)


def test_directions_that_are_not_there_are_not_counted():
    left = drawn(20, 3)
    twice = subspaces.product_spectrum(torch.cat([left, left], 1), drawn(6, 14, seed=1))
    assert twice.rank == 3
    assert subspaces.spectrum(left @ drawn(3, 14, seed=1)).rank == 3
    directions = torch.linalg.qr(drawn(4, 4)).Q  # B A is 0 but for rounding
    left, right = drawn(20, 2) @ directions[:2], (drawn(14, 2, seed=1) @ directions[2:]).t()
    assert 0 < float((left @ right).abs().max()) < 1e-5
    assert subspaces.product_spectrum(left, right).rank == 0


def test_effective_and_stable_rank():
    values = torch.tensor([5.0, 2.0, 1.0, 0.25])
    assert subspaces.effective_rank(values) == pytest.approx(math.exp(entropy(values.numpy())), rel=1e-6)
    assert subspaces.effective_rank(torch.ones(7)) == pytest.approx(7)
    whole = np.diag(values.numpy())
    expected = np.linalg.norm(whole) ** 2 / np.linalg.norm(whole, 2) ** 2
    assert subspaces.stable_rank(values) == pytest.approx(expected, rel=1e-6)
    assert subspaces.effective_rank(torch.ones(0)) is None
    assert subspaces.stable_rank(torch.ones(0)) is None


def test_phi_is_the_mean_squared_cosine_of_the_principal_angles():
    first, second = orthonormal(12, 4, 0), orthonormal(12, 7, 1)
    phi = subspaces.similarity(first, second)
    for i in range(1, 5):
        for j in range(1, 8):
            angles = subspace_angles(first[:, :i].numpy(), second[:, :j].numpy())
            assert float(phi[i - 1, j - 1]) == pytest.approx(np.mean(np.cos(angles) ** 2), abs=1e-12)
    assert subspaces.similarity(first, first).diagonal().numpy() == pytest.approx(np.ones(4))


def test_random_subspaces_share_what_the_formulas_say():
    """2000 draws; seen: 0.7% off at most."""
    n, draws = 16, 2000
    phi = torch.stack([subspaces.similarity(orthonormal(n, 3, s), orthonormal(n, 6, 9000 + s)) for s in range(draws)])
    for i, j in ((1, 1), (2, 2), (3, 6), (1, 6)):
        expected = subspaces.similarity_at_random(i, j, n)
        assert float(phi[:, i - 1, j - 1].mean()) == pytest.approx(expected, rel=0.02)
    weight = drawn(16, 24).double()
    seen = [subspaces.projected(weight, orthonormal(16, 4, s), orthonormal(24, 4, 9000 + s)) for s in range(draws)]
    expected = subspaces.projected_at_random(float(weight.norm()), 4, (16, 24))
    assert math.sqrt(np.mean(np.square(seen))) == pytest.approx(expected, rel=0.02)


def test_random_directions_of_table_7_of_lora_follow_from_its_norm():
    """W_q of GPT-3, 12288 x 12288, ||W|| = 61.95: the paper has 0.02 and 0.33 of one draw each."""
    shape = (12288, 12288)
    assert subspaces.projected_at_random(61.95, 4, shape) == pytest.approx(0.02, abs=0.005)
    assert subspaces.projected_at_random(61.95, 64, shape) == pytest.approx(0.33, abs=0.01)


def test_an_intruder_lies_along_no_singular_vector_of_w():
    u, v = ortho_group.rvs(16, random_state=0), ortho_group.rvs(12, random_state=1)
    weight = torch.tensor(u[:, :12] @ np.diag(np.arange(12.0, 0, -1)) @ v.T, dtype=torch.float32)
    new = torch.tensor(u[:, :12].mean(1) * math.sqrt(12), dtype=torch.float32)  # as far from one as from another
    known = torch.tensor(u[:, 5], dtype=torch.float32)
    row = torch.tensor(v[:, 5], dtype=torch.float32)

    def intruders(direction, size):
        left, right = size * direction[:, None], row[None]
        figures = layer_figures(Update(weight, left, right))
        tuned = np.linalg.svd((weight + left @ right).numpy())[0]
        cosines = [max(abs(float(tuned[:, j] @ u[:, i])) for i in range(12)) for j in range(10)]
        assert figures["cosines"] == pytest.approx(cosines, abs=1e-4)
        assert figures["intruders"] == sum(cosine < 0.5 for cosine in cosines)
        return figures["intruders"]

    assert intruders(new, 50.0) == 1
    assert intruders(known, 50.0) == 0
    assert intruders(new, 0.01) == 0


@pytest.mark.parametrize("factored", [True, False])
def test_the_figures_of_a_layer_are_numpys(factored):
    weight, left, right = drawn(20, 14), drawn(20, 3, seed=1), drawn(3, 14, seed=2)
    delta, w = left.double().numpy() @ right.double().numpy(), weight.double().numpy()
    given = Update(weight, left, right) if factored else Update(weight, dense=left @ right)
    figures = layer_figures(given)
    u, s, vh = np.linalg.svd(delta)
    own = np.linalg.svd(w)[1]
    s, norm = s[:3], np.linalg.norm
    expected = {
        "rank": 3,
        "effective_rank": math.exp(entropy(s)),
        "stable_rank": norm(s) ** 2 / s[0] ** 2,
        "frobenius": norm(delta),
        "spectral": norm(delta, 2),
        "weight_frobenius": norm(w),
        "weight_spectral": norm(w, 2),
        "relative_frobenius": norm(delta) / norm(w),
        "relative_spectral": norm(delta, 2) / norm(w, 2),
        "directions": 3,
        "projected": norm(u[:, :3].T @ w @ vh[:3].T),
        "projected_own": norm(own[:3]),
        "projected_random": norm(w) * 3 / math.sqrt(20 * 14),
        "amplification": norm(delta) / norm(u[:, :3].T @ w @ vh[:3].T),
    }
    assert {key: figures[key] for key in expected} == pytest.approx(expected, rel=2e-6)
    assert figures["singular_values"] == pytest.approx(s, rel=1e-5)
    assert figures["r"] == (3 if factored else None)


@pytest.mark.parametrize("factored", [True, False])
def test_of_an_update_that_is_zero_what_is_undefined_is_null(factored):
    weight, zero = drawn(6, 5), torch.zeros(6, 2)
    update = Update(weight, zero, drawn(2, 5)) if factored else Update(weight, dense=torch.zeros(6, 5))
    figures = json.loads(json.dumps(layer_figures(update), allow_nan=False))
    undefined = ("effective_rank", "stable_rank", "projected", "projected_own", "projected_random", "amplification")
    assert {figures[key] for key in undefined} == {None}
    assert (figures["rank"], figures["frobenius"], figures["intruders"]) == (0, 0.0, 0)
    assert figures["singular_values"] == []


def test_layers_of_all_blocks_have_one_type():
    names = [f"model.layers.{i}.{end}" for i in range(2) for end in ("self_attn.q_proj", "mlp.up_proj")]
    assert list(types(names).values()) == ["self_attn.q_proj", "mlp.up_proj"] * 2
    assert set(types(names[::2]).values()) == {"q_proj"}
    assert set(types(["h.0.attn.c_proj", "h.0.mlp.c_proj"]).values()) == {"attn.c_proj", "mlp.c_proj"}
    assert set(types([f"m.experts.w.{e}" for e in range(3)]).values()) == {"w.*"}


def test_the_smallest_rank_is_paired_with_the_largest_and_the_first_seed_with_the_others(write_runs):
    folder = write_runs({(r, seed): 3.0 for r in (4, 16, 2) for seed in (0, 1, 2)})
    results = read_results(folder / "runs")
    found = [(pair.by, pair.first.name, pair.second.name) for pair in subspace_files.pairs(results)]
    assert found == [
        *(("rank", f"2-{seed}", f"16-{seed}") for seed in (0, 1, 2)),
        ("rank and seed", "2-0", "16-1"),
        *(("seed", f"{r}-0", f"{r}-{seed}") for r in (16, 2, 4) for seed in (1, 2)),
    ]


def test_trials_that_differ_in_more_are_no_pair(write_runs):
    def other_rate(trial, r, seed):
        trial["config"]["optimizer"]["lr"] = 0.1 if (r, seed) in ((2, 0), (8, 1)) else 0.2

    folder = write_runs({(r, seed): 3.0 for r in (2, 8) for seed in (0, 1)}, other_rate)
    assert subspace_files.pairs(read_results(folder / "runs")) == []
