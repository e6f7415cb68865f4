"""cuBLAS' workspaces are in torch's allocator on a card, and so in every plan for one, once."""

from dataclasses import replace

import pytest
import torch

from loralab.planning import workspace
from loralab.planning.plan import CONTEXT, FRAGMENTATION, estimate, predict
from loralab.planning.workspace import cublas_workspace, held_workspaces

MIB = 2**20


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def on_card(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(
    ("capability", "size"), [((7, 5), 8.125), ((8, 0), 8.125), ((8, 9), 8.125), ((9, 0), 32), ((10, 0), 32)]
)
def test_its_size_is_the_cards(monkeypatch, capability, size):
    on_card(monkeypatch, capability)
    assert cublas_workspace() == size * MIB


def test_without_a_card_a_hopper_is_assumed():
    assert cublas_workspace() == 32 * MIB


@pytest.mark.parametrize(
    ("setting", "size"),
    [(":16:8", 128 * 1024), (":4096:2:16:8", 8.125 * MIB), (":0:0", 0), ("nonsense", 32 * MIB), ("", 32 * MIB)],
)
def test_what_torch_is_told_by_the_environment_counts(monkeypatch, setting, size):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", setting)
    assert cublas_workspace() == size


@pytest.mark.parametrize("whole", [False, True])
def test_a_plan_for_a_card_holds_those_of_both_threads_from_the_first_product_on(monkeypatch, make_spec, whole, vary):
    spec = make_spec()
    if whole:  # the first step is traced as well
        spec = vary(spec, quantization=_resident())
    with_them = predict(spec, "cuda")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    without = predict(spec, "cuda")
    held = workspace.THREADS * 32 * MIB
    assert with_them.predicted_peak_bytes - without.predicted_peak_bytes == held
    assert with_them.by_kind["constants"] - without.by_kind["constants"] == held
    grown = {phase: with_them.by_phase[phase] - without.by_phase[phase] for phase in without.by_phase}
    assert grown == {"load": 0, "forward": held, "backward": held, "optimizer": held, "evaluation": held}


def test_a_stack_of_many_layers_holds_them_once(monkeypatch, make_spec, make_model):
    model = make_model()
    spec = replace(make_spec(), model=replace(model, config={**model.config, "num_hidden_layers": 7}))
    whole = predict(spec, "cuda").by_kind["constants"]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert whole - predict(spec, "cuda").by_kind["constants"] == held_workspaces_of_hopper()


def held_workspaces_of_hopper():
    return 2 * 32 * MIB


def test_a_device_needs_them_once_and_a_cpu_never(make_spec):
    found = predict(make_spec(), "cuda")
    assert found.device_bytes == int(found.predicted_peak_bytes * FRAGMENTATION) + CONTEXT
    assert predict(make_spec(), "cpu").predicted_peak_bytes < held_workspaces()


def test_the_first_look_counts_them_too(monkeypatch, make_spec):
    spec = make_spec()
    one, two = estimate(spec, "cuda"), estimate([spec, spec], "cuda")
    on_cpu = estimate(spec, "cpu")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert one - estimate(spec, "cuda") == two - estimate([spec, spec], "cuda") == held_workspaces_of_hopper()
    assert on_cpu == estimate(spec, "cpu")


def _resident():
    from loralab.quantization.four_bit import FourBit

    return FourBit(dequantize="resident")
