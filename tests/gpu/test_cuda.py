"""What only a CUDA card can show."""

import json

import pytest
import torch

from loralab.bench.measurements import Clock
from loralab.cli import main
from loralab.forward.stacked import Forward
from loralab.models import loading, pretrained
from loralab.numerics import blockwise, codebooks
from loralab.optim import managed, optimizers
from loralab.optim.optimizers import AdamW
from loralab.planning import foresee
from loralab.planning.plan import CONTEXT
from loralab.planning.workspace import cublas_workspace, held_workspaces
from loralab.quantization.four_bit import FourBit
from loralab.quantization.none import NoQuantization
from loralab.records import record
from loralab.training import generation
from loralab.training.module import FineTuner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

NAMES = ("adamw_32bit", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")


@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_four_bit_layer_computes_what_the_reference_says(block_size, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=generator)
    dense = torch.nn.Linear(256, 96, bias=False)
    dense.weight.data.copy_(weight)
    layer = FourBit(quant_type="nf4", block_size=block_size, double_quant=False).convert(dense).to("cuda")
    codes, absmax = blockwise.quantize_blockwise(weight, codebooks.nf4(), block_size)
    expected = blockwise.dequantize_blockwise(codes, absmax, codebooks.nf4(), block_size).view(96, 256).double()
    x = torch.randn(16, 256, generator=generator).to(dtype)
    given = x.to("cuda").requires_grad_(True)
    out = layer(given)
    out.sum().backward()
    bound = 1e-5 if dtype == torch.float32 else 2e-2  # of the largest value; bfloat16 has 8 bits of mantissa
    for ours, theirs in (
        (out, x.double() @ expected.T),
        (given.grad, torch.ones(16, 96, dtype=torch.float64) @ expected),
    ):
        error = (ours.detach().double().cpu() - theirs).abs().max() / theirs.abs().max()
        assert float(error) < bound


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_pages_exactly_where_its_name_says_so(name):
    if name in optimizers.UNPAGED and optimizers.cannot_page():
        pytest.skip(optimizers.cannot_page())
    spec = AdamW(name=name)
    parameters = [torch.nn.Parameter(torch.zeros(size, device="cuda")) for size in (50_000, 200_000)]
    optimizer = spec.build([spec.group(parameters)])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    told = optimizers.describe(optimizer, name)
    bytes_each = 1 if "8bit" in name else 4
    assert told["paged_bytes"] == (2 * 200_000 * bytes_each if name in optimizers.UNPAGED else 0)
    assert told["paging"] == ("on" if name in optimizers.UNPAGED else "off")
    assert all(bool((parameter < 0).all()) for parameter in parameters)


def test_paged_state_lies_outside_of_torchs_memory():
    if reason := optimizers.cannot_page():
        pytest.skip(reason)
    used = {}
    for name in ("adamw_32bit", "paged_adamw"):
        parameter = torch.nn.Parameter(torch.zeros(1_000_000, device="cuda"))
        spec = AdamW(name=name)
        optimizer = spec.build([spec.group([parameter])])
        before = torch.cuda.memory_allocated()
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        used[name] = torch.cuda.memory_allocated() - before
    assert used["adamw_32bit"] - used["paged_adamw"] >= 0.99 * 8_000_000


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Trains a small random Llama on the card by the command line; returns its record."""
    monkeypatch.chdir(tmp_path)
    rows = (json.dumps({"text": f"row {i} holds word {i} " * 200}) for i in range(8))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")

    def run(*words):
        data = ["data=files", "data.text='{text}'", "data.train=rows.jsonl", "data.validation=rows.jsonl"]
        fixed = ["model=random", "model.max_length=128", "data.batch_size=4", "trainer=gpu", "logger=none"]
        assert main.run(["train", *fixed, *data, "trainer.max_steps=4", *words, "hydra.run.dir=run"]) == 0
        return record.read(tmp_path / "run")

    return run


def test_products_take_the_workspaces_that_a_plan_counts():
    torch._C._cuda_clearCublasWorkspaces()
    x = torch.ones(512, 512, dtype=torch.bfloat16, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.mm(x, x)
    assert torch.cuda.memory_allocated() - before == cublas_workspace()
    torch.mm(x.clone().requires_grad_(True), x).sum().backward()  # in autograd's own thread
    assert torch.cuda.memory_allocated() - before == held_workspaces()


@pytest.mark.parametrize("drawn_on", ["cpu", "device"])
def test_a_random_base_is_packed_on_the_card_and_one_of_a_cpus_numbers_is_the_same_there(drawn_on):
    spec = pretrained.Random(drawn_on=drawn_on)
    there, here = (
        dict(loading.tensors(spec.weights(spec.prepared_config(None), NoQuantization(), "auto", device)))
        for device in ("cuda", "cpu")
    )
    assert {tensor.device.type for tensor in there.values()} == {"cuda"}
    alike = [torch.equal(tensor.cpu(), here[name]) for name, tensor in there.items() if "weight" in name]
    assert all(alike) == (drawn_on == "cpu")
    packed = spec.weights(spec.prepared_config(None), FourBit(), "auto", "cuda")
    assert {tensor.device.type for _, tensor in loading.tensors(packed)} == {"cuda"}


def test_the_base_stays_on_the_card_between_fit_validation_and_generation(trained, monkeypatch):
    seen, answers = [], generation.answers

    def noted(writer, *rest):
        seen.extend({tensor.device.type for _, tensor in loading.tensors(writer.model)})
        return answers(writer, *rest)

    monkeypatch.setattr(generation, "answers", noted)
    monkeypatch.setattr(FineTuner, "cpu", lambda self: pytest.fail("the module was moved to the host"))
    words = ["data.generate_rows=2", "data.prompt='{text}'", "data.target='{text}'", "data.text=null"]
    assert trained("quantization=nf4_double", *words)["status"] == "completed"
    assert seen == ["cuda"]


@pytest.mark.parametrize("quantization", ["none", "nf4_double"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_planned_peak_is_within_five_percent_of_the_measured(trained, quantization, precision):
    memory = trained(f"quantization={quantization}", f"trainer.precision={precision}")["memory"]
    assert memory["device"] == "cuda"
    assert memory["predicted_peak_bytes"] == pytest.approx(memory["measured_peak_bytes"], rel=0.05)


def test_auto_is_bf16_mixed_on_the_card_and_tf32_is_near_float32(trained, curve, tmp_path):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the card has neither bfloat16 nor TF32")
    assert trained()["base"]["precision"] == "bf16-mixed"
    curves = {}
    for precision in ("tf32", "32-true"):
        assert trained(f"trainer.precision={precision}")["base"]["precision"] == precision
        curves[precision] = curve(tmp_path / "run")
    assert curves["tf32"] == pytest.approx(curves["32-true"], rel=2.5e-3)
    assert curves["tf32"] != curves["32-true"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_run_on_the_card_learns_and_leaves_a_whole_record(trained, curve, tmp_path):
    stored = trained("quantization=nf4_double", "trainer.max_steps=20", "optimizer.lr=1e-2")
    assert (stored["status"], stored["time"]["steps"]) == ("completed", 20)
    losses = curve(tmp_path / "run")
    assert losses[-1] < losses[0]
    assert all(stored["memory"]["by_phase"][phase] > 0 for phase in ("forward", "backward", "optimizer"))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_packed_rows_have_the_losses_on_the_card_that_they_have_on_a_cpu(trained, curve, tmp_path):
    lines = (json.dumps({"q": f"row {i}", "a": "word " * (1 + i % 5)}) + "\n" for i in range(40))
    (tmp_path / "short.jsonl").write_text("".join(lines))
    words = ["data.train=short.jsonl", "data.validation=short.jsonl", "data.text=null", "data.packing=true"]
    words += ["data.prompt='{q}'", "data.target='{a}'", "trainer.precision=32-true"]
    stored, on_card = trained(*words), curve(tmp_path / "run")
    assert stored["data"]["packing"]["sequences"] < stored["data"]["packing"]["rows"]
    assert stored["memory"]["predicted_peak_bytes"] == pytest.approx(stored["memory"]["measured_peak_bytes"], rel=0.05)
    trained(*words, "trainer=cpu", "--fresh")
    assert on_card == pytest.approx(curve(tmp_path / "run"), rel=1e-3)


def test_ragged_rows_and_shared_keys_are_planned_within_five_percent(trained, tmp_path):
    lines = (json.dumps({"text": f"row {i} holds word {i} " * (4 + 6 * i)}) + "\n" for i in range(8))
    (tmp_path / "ragged.jsonl").write_text("".join(lines))
    words = ["data.train=ragged.jsonl", "data.validation=ragged.jsonl", "trainer.precision=bf16-mixed"]
    words += ["+model.config.num_attention_heads=8", "+model.config.num_key_value_heads=2"]
    memory = trained(*words)["memory"]
    assert memory["predicted_peak_bytes"] == pytest.approx(memory["measured_peak_bytes"], rel=0.05)


def test_an_overflow_under_16_mixed_skips_its_update_and_ends_no_run(trained, tmp_path):
    stored = trained("trainer.precision=16-mixed", "trainer.max_steps=12")
    assert (stored["status"], stored["time"]["steps"]) == ("completed", 12)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained_rows = [row for row in rows if "train/loss" in row]
    assert all(("train/grad_norm" in row) != ("train/skipped_update" in row) for row in trained_rows)
    assert any("train/grad_norm" in row for row in trained_rows)


def test_managed_memory_is_given_back():
    if reason := optimizers.cannot_page():
        pytest.skip(reason)
    spec = AdamW(name="paged_adamw")
    parameter = torch.nn.Parameter(torch.zeros(2**26, device="cuda"))  # 512 MiB of state
    optimizer = spec.build([spec.group([parameter])])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    assert managed.release(optimizer) == 2**29
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] - before >= 2**28  # the update had them on the card
    optimizer.step()  # and a new state is made where it is asked for again
    assert optimizers.describe(optimizer, spec.name)["paged_bytes"] == 2**29


def test_managed_memory_that_the_host_lacks_is_out_of_memory_and_no_end_of_the_process(trained, monkeypatch):
    if reason := optimizers.cannot_page():
        pytest.skip(reason)
    monkeypatch.setattr(managed, "SPARE", 2**50)
    with pytest.raises(AssertionError, match="6 == 0"):  # the exit code of out of memory
        trained("optimizer=paged_adamw", "optimizer.flat=true", "adapter.r=64")


def test_a_check_that_runs_out_of_memory_is_no_disagreement(trained, monkeypatch):
    """The plain way of the first batch asks for more than the card has."""
    real = Forward._plain

    def plain(self, logits, labels):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return real(self, logits, labels)

    monkeypatch.setattr(Forward, "_plain", plain)
    with pytest.raises(AssertionError, match="6 == 0"):
        trained()


def test_what_is_free_counts_no_context_twice():
    free = torch.cuda.mem_get_info()[0]
    if torch.cuda.device_count() == 1:
        assert foresee.free_bytes("cuda") == pytest.approx(free + CONTEXT, abs=2**26)


def test_launches_waits_and_the_busy_share_are_counted():
    x = torch.ones(2048, 2048, device="cuda")
    torch.mm(x, x)
    clock = Clock("cuda", steps=4, profiled=2)
    for _ in range(4):
        for _ in range(10):
            torch.mm(x, x)
        float(x[0, 0])
        clock()
    assert clock.launches["launches"] >= 10
    assert clock.launches["waits"] == 1
    assert 0 < clock.launches["busy_share"] <= 1
