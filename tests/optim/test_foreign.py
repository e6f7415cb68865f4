"""Optimizers, schedulers and functions that are no specs: packed as alone, resumed, planned, and refused."""

import sys

import pytest
import torch
from torch.optim import lr_scheduler

from loralab.adapters.lora import LoRA
from loralab.config.build import build, trial_id, trial_spec
from loralab.config.compose import compose, plain
from loralab.errors import ConfigError
from loralab.optim.foreign import optimizer_of
from loralab.optim.optimizers import AdamW
from loralab.optim.schedulers import schedule_of
from loralab.planning.plan import predict
from loralab.planning.sizes import sizes
from loralab.running.runner import Runner
from loralab.scheduling.members import alone
from loralab.training.checkpoint import Checkpoint
from loralab.training.module import FineTuner

SGD = {"lr": 0.05, "momentum": 0.9}


class Signs(torch.optim.Optimizer):
    """A small one of one's own: the sign of the mean gradient; its closure is called without gradients."""

    def __init__(self, params, lr=1e-3, beta=0.9, scale=1.0):
        super().__init__(params, {"lr": lr, "beta": beta})
        self.scale = scale

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 1 - group["beta"])
                    parameter.add_(mean.sign(), alpha=-group["lr"] * self.scale)
        return loss


class Mixing(Signs):
    """What moves a parameter depends on all the others."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        self.norm = sum(float(p.norm()) for group in self.param_groups for p in group["params"])
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - 1e-4 * self.norm)
        return loss


class Blind(torch.optim.Optimizer):
    """Has no learning rate."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, {})

    def step(self, closure=None):
        return None


class Needy(Signs):
    """Moves what has no gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.99)
        return loss


def halving(step, every=4):
    return 0.5 ** (step // every)


def falling(step, max_steps):
    return 1 - step / max_steps


def below(step):
    return 1 - step


def of(target, **values):
    """The spec as a configuration builds it."""
    group = "schedule" if "schedul" in target or target.split(".")[-1].islower() else "optimizer"
    return build({"_target_": target, **values}, group)


HERE = "own_optimizers"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """The classes above under a name that can be imported, as those of a module of the user's are."""
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])
    for made in (Signs, Mixing, Needy, Blind, halving, falling, below):
        monkeypatch.setattr(made, "__module__", HERE)


@pytest.mark.parametrize(
    ("first", "second", "size"),
    [
        ({"cls": torch.optim.SGD, **SGD}, {"cls": torch.optim.SGD, "lr": 0.1}, 2),  # no momentum beside one with it
        ({"cls": torch.optim.RMSprop, "lr": 1e-3}, {"cls": torch.optim.RMSprop, "lr": 2e-3, "alpha": 0.9}, 2),
        ({"cls": Signs, "lr": 1e-3}, {"cls": Signs, "lr": 3e-3}, 2),
        ({"cls": Signs, "lr": 1e-3}, {"cls": Signs, "lr": 1e-3, "scale": 2.0}, 0),  # not the group's
        ({"cls": Signs, "lr": 1e-3}, {"cls": Signs, "lr": 1e-3, "beta": 0.5}, 0),  # nobody knows whether it is
        ({"cls": torch.optim.SGD, **SGD}, {"cls": torch.optim.RMSprop, "lr": 1e-3}, 0),
    ],
)
def test_trials_share_a_pass_where_one_optimizer_serves_both_and_then_have_the_bits_of_one_alone(
    make_spec, weights, curve, first, second, size
):
    def two(prefix):
        given = [dict(one) for one in (first, second)]
        optimizers = [optimizer_of(one.pop("cls"), one) for one in given]
        return [make_spec(f"{prefix}{n}", optimizer=one, seed=n) for n, one in enumerate(optimizers)]

    packed = two("packed")
    assert (packed[0].pack_key == packed[1].pack_key) == bool(size)
    assert not any(map(alone, packed))
    if not size:
        return
    solo = two("solo")
    together, apart = Runner().run(packed), [Runner().run([spec])[0] for spec in solo]
    assert [one["pack"]["size"] for one in together] == [2, 2], together[0]["error"]
    for ours, theirs, one, other in zip(packed, solo, together, apart, strict=True):
        assert curve(ours.folder) == curve(theirs.folder)
        mine, same = weights(ours.folder), weights(theirs.folder)
        assert all(torch.equal(mine[key], same[key]) for key in mine)
        assert one["optimizer"] == other["optimizer"]


def test_one_that_mixes_its_groups_runs_alone_and_its_record_says_what_is_not_counted(make_spec):
    spec = make_spec("m", optimizer=optimizer_of(Mixing, {"lr": 1e-3}))
    reason = "keeps state beside that of its parameters, mixes its groups, or needs all gradients"
    assert alone(spec) == f"optimizer {HERE}.Mixing {reason}"
    (record,) = Runner().run([spec])
    assert record["optimizer"]["note"] == alone(spec)
    both = Runner().run([make_spec(name, optimizer=spec.optimizer) for name in "no"])
    assert all("cannot share a pass: optimizer" in one["error"] for one in both)


@pytest.mark.parametrize(("cls", "shares"), [(Signs, True), (Mixing, False), (Needy, False), (torch.optim.Adam, True)])
def test_a_pass_is_shared_where_trials_do_not_feel_each_other(cls, shares):
    assert bool(optimizer_of(cls, {"lr": 1e-3}).why_alone) != shares


@pytest.mark.parametrize("cls", [torch.optim.SGD, Signs])
def test_a_run_that_broke_off_goes_on_with_the_same_bits(make_spec, weights, break_off, cls):
    def one(name):
        optimizer = optimizer_of(cls, SGD if cls is torch.optim.SGD else {"lr": 1e-3})
        schedule = schedule_of(lr_scheduler.CosineAnnealingLR, {"T_max": 4})
        callbacks = {"checkpoint": lambda: Checkpoint(None, 1)}
        return make_spec(name, optimizer=optimizer, schedule=schedule, callbacks=callbacks)

    whole, again = one("whole"), one("again")
    Runner().run([whole])
    break_off([again], step=2)
    assert Runner().run([again])[0]["resumed_from"] == 2
    ours, theirs = weights(again.folder), weights(whole.folder)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_update_that_was_cut_short_is_not_gone_on_from(make_spec, monkeypatch):
    """A momentum buffer does not say in which step it was made."""
    spec = make_spec(
        "cut", optimizer=optimizer_of(torch.optim.SGD, SGD), callbacks={"checkpoint": lambda: Checkpoint(None, 1)}
    )
    seen, real = [], torch.optim.SGD.step

    def cut(self, closure=None):
        loss = closure()
        if seen:
            (trial,) = seen[0]
            if trial.step == 2:
                raise KeyboardInterrupt
        real(self)
        return loss

    started = FineTuner.on_train_start

    def remember(self):
        seen.append(self.trials)
        return started(self)

    monkeypatch.setattr(torch.optim.SGD, "step", cut)
    monkeypatch.setattr(FineTuner, "on_train_start", remember)
    with pytest.raises(BaseException):  # noqa: B017, PT011 - Lightning's or Python's own
        Runner().run([spec])
    (trial,) = seen[0]
    assert trial.updating
    assert not trial.is_in_step({})
    stored = torch.load(spec.folder / "checkpoints" / "last.pt")
    assert stored["step"] == 2


@pytest.mark.parametrize("target", ["torch.optim.SGD", "torch.optim.Adagrad", f"{HERE}.Signs"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_predicted_state_is_the_one_that_is_held(make_spec, target, momentum):
    more = {"momentum": momentum} if target.endswith("SGD") else {}
    spec = make_spec("p", adapter=LoRA(r=16), optimizer=of(target, lr=0.01, **more))
    (record,) = Runner().run([spec])
    held = record["optimizer"]["state_bytes"]
    parameters = record["adapter"]["trainable_parameters"]
    assert held == (0 if target.endswith("SGD") and not momentum else 4 * parameters)
    assert sizes(spec).optimizer == held
    counters = 4 * len(list(spec.adapter.attach(_skeleton(spec)).parameters())) if target.endswith("Adagrad") else 0
    assert predict(spec, "cpu", rows=2, length=24).by_kind["optimizer"] in (held, held + counters)


def _skeleton(spec):
    from loralab.planning.sizes import skeleton

    return skeleton(spec.model)


def test_what_cannot_be_traced_is_not_predicted_and_says_so(make_spec):
    spec = make_spec("q", optimizer=of(f"{HERE}.Mixing", lr=0.01))
    with pytest.raises(ConfigError, match="cannot be stepped without values, so its memory is not predicted"):
        predict(spec, "cpu", rows=2, length=24)


@pytest.mark.parametrize(
    ("target", "values"),
    [
        (lr_scheduler.StepLR, {"step_size": 3, "gamma": 0.5}),
        (lr_scheduler.OneCycleLR, {"max_lr": 0.4, "total_steps": 12, "cycle_momentum": False}),
        (lr_scheduler.CyclicLR, {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 4, "cycle_momentum": False}),
        (lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": 4, "eta_min": 0.03}),
        (lr_scheduler.PolynomialLR, {"total_iters": 9, "power": 2.0}),
    ],
)
def test_a_scheduler_gives_each_group_the_rates_that_it_gives_in_torch(target, values):
    peer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.2}])
    theirs, ours = target(peer, **values), schedule_of(target, values).factor(11, 0.2)
    rates = []
    for _ in range(12):
        rates.append(peer.param_groups[0]["lr"])
        peer.step()
        theirs.step() if len(rates) < 12 else None
    assert [0.2 * ours(step) for step in (5, *range(12))] == pytest.approx([rates[5], *rates], rel=1e-12)


def test_a_function_is_given_the_step_and_where_it_asks_the_number_of_steps():
    assert [of(f"{HERE}.halving", every=2).factor(8, 0.1)(step) for step in range(5)] == [1, 1, 0.5, 0.5, 0.25]
    assert [of(f"{HERE}.falling").factor(4, 0.1)(step) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]


WORDS = "optimizer._target_"
PLATEAU = f"schedule._target_={lr_scheduler.ReduceLROnPlateau.__module__}.ReduceLROnPlateau"
COSINE = "schedule._target_=torch.optim.lr_scheduler.CosineAnnealingLR"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            [f"{WORDS}=torch.nn.Linear"],
            "optimizer._target_=torch.nn.modules.linear.Linear is no optimizer; valid: a class",
        ),
        ([f"{WORDS}=torch.optim.SDG"], "cannot be found"),
        (
            [f"{WORDS}=torch.optim.SGD", "+optimizer.momentun=1"],
            "momentun is not an option of SGD; did you mean momentum?",
        ),
        ([f"{WORDS}=torch.optim.SGD", "optimizer.betas=[0.9,0.9]"], "optimizer.betas is not an option of SGD"),
        ([f"{WORDS}=torch.optim.SGD", "+optimizer.momentum=-1"], "SGD refuses its options: Invalid momentum value: -1"),
        ([f"{WORDS}=torch.optim.SGD", "optimizer.lr=-1"], "optimizer.lr must be a positive number"),
        ([f"{WORDS}=torch.optim.SGD", "optimizer.lr_ratio=0"], "optimizer.lr_ratio must be a positive number"),
        ([f"{WORDS}=torch.optim.LBFGS"], "LBFGS.step needs a closure, which it calls several times a step"),
        ([f"{WORDS}=torch.optim.SparseAdam"], "SparseAdam refuses its options: SparseAdam does not support dense"),
        ([f"{WORDS}={HERE}.Blind"], "Blind has no lr in its parameter groups"),
        ([f"{WORDS}={HERE}.halving"], f"{HERE}.halving is no optimizer"),
        ([PLATEAU], "ReduceLROnPlateau lowers the rate by a validation's score"),
        ([COSINE], "schedule.T_max is missing, which CosineAnnealingLR needs; +schedule.T_max=VALUE sets it"),
        ([COSINE, "+schedule.T_maxx=4"], "schedule.T_maxx is not an option of CosineAnnealingLR; did you mean T_max?"),
        ([COSINE, "+schedule.T_max=abc"], "CosineAnnealingLR refuses its options"),
        (["schedule._target_=torch.nn.Linear"], "torch.nn.modules.linear.Linear is no schedule"),
        (
            [f"schedule._target_={HERE}.halving", "+schedule.evry=3"],
            "schedule.evry is not an option of halving; did you",
        ),
        ([f"schedule._target_={HERE}.halving", "+schedule.every=0"], "halving refuses its options"),
        ([f"schedule._target_={HERE}.below"], "below gives lr times -1 at step 2; valid: at least 0"),
        (
            ["schedule._target_=torch.optim.lr_scheduler.CyclicLR", "+schedule.base_lr=1", "+schedule.max_lr=2"],
            "momentum",
        ),
    ],
)
def test_what_is_wrong_is_refused_before_weights_load(tmp_path, words, says):
    with pytest.raises(ConfigError) as refused:
        trial_spec(compose(words), tmp_path)
    assert says in str(refused.value)


def test_a_trial_is_named_by_what_differs_from_the_classs_own_defaults():
    def named(*words):
        return trial_id(compose([f"{WORDS}=torch.optim.SGD", *words]))

    first = named()
    assert first == named("+optimizer.momentum=0.0", "optimizer.weight_decay=0")
    assert first == trial_id(compose([f"{WORDS}=torch.optim.sgd.SGD"]))
    others = [named("+optimizer.momentum=0.9"), named("optimizer.lr=0.1"), trial_id(compose([]))]
    others += [trial_id(compose([f"schedule._target_={HERE}.{name}"])) for name in ("halving", "falling")]
    assert len({first, *others}) == 6


def test_the_yamls_keys_but_for_the_rate_are_not_the_classs():
    found = plain(compose([f"{WORDS}=torch.optim.AdamW", "optimizer.lr=0.3"]), [f"{WORDS}=torch.optim.AdamW"])
    assert found["optimizer"] == {"_target_": "torch.optim.AdamW", "lr": 0.3, "lr_ratio": 1.0}
    assert optimizer_of(torch.optim.AdamW, {"lr": 0.3}).build(
        [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    ).defaults["weight_decay"] == pytest.approx(0.01)
    assert isinstance(build(plain(compose([]))["optimizer"], "optimizer"), AdamW)
