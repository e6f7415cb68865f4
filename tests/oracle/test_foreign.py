"""A bare optimizer and scheduler of torch's train as in a plain loop of PyTorch over PEFT's adapter."""

import plain
import pytest
import torch
from lab import Watch, run

from loralab.optim.foreign import optimizer_of
from loralab.optim.schedulers import schedule_of

COUNT, WARM = 8, {"T_max": 8, "eta_min": 0.02}


class Each(Watch):
    """Keeps the rows of every step, and the parameters before the first."""

    def __init__(self):
        self.rows, self.start = [], {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        (trial,) = module.trials
        if not self.rows:
            self.start = {name: value.detach().clone() for name, value in trial.adapter.peft_state().items()}
        self.rows.append([row for _, row in self.batch[0]["chosen"]])


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_sgd_with_momentum_and_cosine_annealing_give_the_losses_of_a_plain_loop(lab, curve, ratio):
    case, watch = lab("causal_lm", "llama", "dense"), Each()
    given = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    optimizer = optimizer_of(torch.optim.SGD, {"lr": 0.1, "lr_ratio": ratio, **given})
    schedule = schedule_of(torch.optim.lr_scheduler.CosineAnnealingLR, WARM)
    spec = case.spec("sgd", COUNT, 4, optimizer=optimizer, schedule=schedule, callbacks={"w": lambda: watch})
    (record,) = run(spec)
    model = case.oracle(spec.folder / "adapter")
    theirs = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    final = {name: p.detach().clone() for name, p in theirs.items()}
    plain.put(model, case.folder, watch.start)
    b = [p for name, p in theirs.items() if "lora_B" in name]
    a = [p for name, p in theirs.items() if "lora_B" not in name]
    peer = torch.optim.SGD([{"params": a}, {"params": b, "lr": 0.1 * ratio}], lr=0.1, **given)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(peer, **WARM)
    losses, rates = [], []
    for chosen in watch.rows:
        rows = [case.rows["train"][place] for place in chosen]
        scored = plain.score(model, rows, "causal_lm")
        losses.append(sum(one[0] for one in scored) / sum(one[2] for one in scored))
        rates.append(peer.param_groups[0]["lr"])
        plain.gradients(model, rows, "causal_lm")
        peer.step()
        annealing.step()
    assert curve(spec.folder) == pytest.approx(losses, rel=1e-5)
    assert curve(spec.folder, "train/lr") == pytest.approx(rates, rel=1e-12)
    for name, value in theirs.items():
        torch.testing.assert_close(final[name], value, rtol=1e-3, atol=1e-5)
    held = sum(state["momentum_buffer"].nbytes for state in peer.state.values())
    assert record["optimizer"]["state_bytes"] == held == 4 * record["adapter"]["trainable_parameters"]
    assert record["optimizer"]["name"] == "torch.optim.sgd.SGD"
