"""Claims of a sweep file against its axes, before anything runs."""

import pytest
from omegaconf import OmegaConf

from loralab.cli import main
from loralab.config import sweep_files
from loralab.config.claims import listed
from loralab.config.places import data_root, options
from loralab.errors import ConfigError
from loralab.scheduling.claims import check, named_by

AXES = ["quantization=none,nf4,fp4", "quantization.double_quant=true,false", "adapter.r=2,8", "seed=0,1"]
WHEN = {"quantization.double_quant": {"quantization": ["nf4"]}}


def checked(claims, words=AXES, chosen=None, **sweep):
    choices = {"sweeps": chosen} if chosen else {}
    master = OmegaConf.create({"sweep": {"claims": claims, **sweep}, "hydra": {"runtime": {"choices": choices}}})
    check(master, words, None)


@pytest.mark.parametrize(
    "claim",
    [
        "nf4 <= fp4",
        "adapter.r=8 <= r=2.0",
        "r=8 & quantization=nf4 <= r=2 & quantization=nf4",
        "falls with adapter.r",
        "flat in quantization within 0.1",
        {"claim": "double_quant=true = double_quant=false within 0.1", "where": {"quantization": "nf4"}},
        {"claim": "nf4 = 4.127 within 0.001", "metric": "base.bits_per_parameter"},
    ],
)
def test_what_trials_have_is_accepted(claim):
    checked([claim], when=WHEN)
    checked(claim, when=WHEN)


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        ("nf4 <= fp5", "no trial of this sweep has quantization=fp5; did you mean fp4? valid: fp4, nf4, none"),
        ("r=4 <= r=2", "no trial of this sweep has adapter.r=4"),
        ("rank=8 <= rank=2", "rank is no axis of this sweep"),
        ("nf4 <= r=2", "names adapter.r and quantization for one of its arms alone"),
        ("rises with optimizer.lr", "optimizer.lr is no axis of this sweep"),
        ("rises with quantization", "quantization has the value none, which is no number"),
        ({"claim": "flat in adapter.r within 1", "where": {"r": 2}}, "has fewer than two values there"),
        ({"claim": "nf4 <= fp4", "where": {"double_quant": True}}, "no trial of this sweep has"),
        ("nf4 = fp4", "nothing equals it exactly"),
        ("nf4 <= quantization=nf4", "holds an arm against itself"),
        ({"claim": "r=8 <= r=2", "where": {"adapter.r": 2}}, "adapter.r is named by its arms and by where"),
        ({"claim": "r=8 <= r=2", "where": {"seed": 0}}, "seed is no axis of this sweep"),
    ],
)
def test_what_no_trial_has_is_refused(claim, why):
    with pytest.raises(ConfigError) as refused:
        checked([claim], when=WHEN)
    assert why in str(refused.value)


def test_words_about_the_sweep_are_no_axis():
    words = ["+sweep.extend=0", *AXES]
    checked(["nf4 <= fp4"], words)
    with pytest.raises(ConfigError, match=r"valid: adapter.r, quantization, quantization.double_quant$"):
        checked(["rank=8 <= rank=2"], words)


@pytest.mark.parametrize(("seeds", "said"), [("seed=0", 1), ("seed=0,1", 0), (None, 1)])
def test_a_claim_about_noise_with_one_seed_is_warned_of(caplog, seeds, said):
    words = [*AXES[:-1], *([seeds] if seeds else [])]
    checked(["nf4 <= fp4", {"claim": "nf4 = 4.127 within 0.001", "metric": "base.bits_per_parameter"}], words)
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(found) == said
    assert all("1 of 2 claims cannot be told from chance with one seed, the first is 'nf4 <= fp4'" in t for t in found)


def test_a_number_that_is_also_an_arm_must_say_which_it_is():
    with pytest.raises(ConfigError, match="8 is a number and an arm; valid: adapter.r=8 for the arm, 8.0"):
        checked(["2 = 8 within 0.1"], ["adapter.r=2,8"])
    checked(["r=2 = r=8 within 0.1", "2 = 8.000000e+00 within 0.1"], ["adapter.r=2,8"])


def test_marks_belong_to_what_is_published():
    checked("nf4 <= fp4", published={"nf4": [27.41]}, marks={"nf4": "unconfirmed"})
    with pytest.raises(ConfigError, match="sweep.marks names nf5, of which nothing is published; did you mean nf4"):
        checked("nf4 <= fp4", published={"nf4": [27.41]}, marks={"nf5": "unconfirmed"})
    with pytest.raises(ConfigError, match="sweep.paper.marks='yes' is no mapping"):
        checked("nf4 <= fp4", paper={"marks": "yes"})


def test_an_arm_that_the_command_line_left_out_is_no_mistake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "sweep: {question: q}\nhydra: {sweeper: {params: {quantization: 'none,nf4,fp4', adapter.r: [2, 8]}}}\n"
    )
    narrowed = ["quantization=nf4", "adapter.r=8"]
    checked(["nf4 <= fp4", "falls with r"], narrowed, chosen="./mine")
    with pytest.raises(ConfigError, match="no trial of this sweep has quantization=fp4"):
        checked(["nf4 <= fp4"], narrowed)
    with pytest.raises(ConfigError, match="no trial of this sweep has quantization=fp5"):
        checked(["nf4 <= fp5"], narrowed, chosen="./mine")


def test_the_axis_that_names_arms_is_the_files_first_whatever_the_command_line_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "hydra: {sweeper: {params: {seed: [0, 1], +method: 'a,b', adapter.r: [2, 8]}}}\n"
    )
    hydra = OmegaConf.create({"runtime": {"choices": {"sweeps": "./mine"}}})
    for sweep in ({"claims": ["a <= b"]}, {"published": {"a": [1.0]}}, {"paper": {"table": "1"}}):
        assert named_by(OmegaConf.create({"sweep": sweep}), hydra) == {"named_by": "method"}
    assert named_by(OmegaConf.create({"sweep": {"question": "q"}}), hydra) == {}
    with pytest.raises(ConfigError, match="has no form that is known"):
        named_by(OmegaConf.create({"sweep": {"claims": ["a is best"]}}), hydra)


def test_the_command_line_ends_with_2_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.run(["sweep", "quickstart", "+sweep.claims=[r has no effect]"]) == 2
    assert "the claim 'r has no effect' has no form that is known" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "quickstart" / "sweep.json").exists()


def test_shipped_claims_are_about_arms_that_there_are():
    claimed = []
    for name in options(data_root() / "sweeps"):
        path = sweep_files.locate(name)
        sweep = OmegaConf.to_container(sweep_files.load(path), resolve=False)["sweep"]
        words = [f"{key}={values}" for key, values in (sweep_files.axes(path) or {}).items()]
        checked(sweep.get("claims"), words, paper=sweep.get("paper"), zip=sweep.get("zip"), when=sweep.get("when"))
        claimed += [name] if listed(sweep) else []
    assert {"paper/llm_int8_table1", "paper/qlora_table2"} <= set(claimed)
