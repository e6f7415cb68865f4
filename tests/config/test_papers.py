"""The sweeps of sweeps/paper: each composes at both scales without a network, and what it says of its paper is checked.

Counts are compared with the papers' own figures, or with the formula that they follow from.
"""

import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from loralab.analysis.disagreements import DISAGREEMENTS, FOLLOWED, sentences
from loralab.analysis.values import label, spelled
from loralab.cli.sweep import sweep_arguments
from loralab.config import claims
from loralab.config.build import trial_id, trial_spec
from loralab.config.compose import compose, plain
from loralab.config.places import data_root
from loralab.config.words import quoted
from loralab.planning.count import count
from loralab.scheduling.dimension import search_of
from loralab.scheduling.rounds import of_axes

FOLDER = data_root() / "sweeps" / "paper"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SCALES = ("mini", "paper")
RELATION = re.compile(r"(?:rises with|falls with|flat in) [\w.+]+|(.+?) (?:<=|>=|<|>|=) (.+?)")
PAGE = Path(data_root(), ".github", "docs", "papers.md")


def trials(name, scale):
    """The configuration without an axis, as Hydra composes it first, and the overrides of each trial."""
    words = quoted([w for w in sweep_arguments(f"paper/{name}", [f"scale={scale}"]) if not w.startswith("hydra.")])
    parsed = OverridesParser.create().parse_overrides(words)
    master = compose([word.input_line for word in parsed if not word.is_sweep_override()])
    return master, of_axes(master, words)


@pytest.fixture(scope="module", params=[(name, scale) for name in NAMES for scale in SCALES], ids="-".join)
def sweep(request):
    """(master configuration, what it says under ``sweep``, the trials' overrides)"""
    master, rows = trials(*request.param)
    return master, plain(master)["sweep"], rows


def labels(rows, sweep):
    """{axis: the labels of its values} of a sweep's trials, those of its search for a dimension among them."""
    found = {}
    for word in [word for words in rows for word in words]:
        key, _, value = word.lstrip("+").partition("=")
        found.setdefault(key, set()).add(label(spelled(value)))
    if search := sweep.get("d90"):
        found["method"].add(search["trial"].partition("=")[2])
    return found


def first_axis(rows):
    return next(word.lstrip("+").partition("=")[0] for word in rows[0] if not word.startswith("+sweeps="))


def test_there_are_the_papers_tables():
    assert len(NAMES) >= 22


def test_it_says_what_it_asks_and_where_the_numbers_come_from(sweep):
    _, about, _ = sweep
    assert about["question"].endswith("?")
    assert about["fixed"]
    paper = about["paper"]
    assert re.search(r"arXiv \d{4}\.\d{5}|PEFT \d|Thinking Machines", paper["table"])
    assert paper["metric"]
    assert set(paper.get("marks") or {}) == set(paper["published"])
    assert set((paper.get("marks") or {}).values()) <= {"confirmed", "unconfirmed"}
    for values in paper["published"].values():
        assert values
        assert all(isinstance(value, int | float) for value in values)
        assert len(values) <= len(paper["columns"])


def test_arms_that_are_published_or_claimed_are_among_its_trials(sweep):
    _, about, rows = sweep
    paper, known = about["paper"], labels(rows, about)
    first = known[first_axis(rows)]
    published = set(paper["published"])
    assert not published or published & first
    if about["scale"] == "paper" and about["name"] not in EXTRA:
        assert published <= first
    for claim in paper.get("claims") or []:
        assert set(claim) <= {"claim", "metric", "where", "source"}
        assert claim["source"]
        for axis, value in (claim.get("where") or {}).items():
            assert label(value) in known[axis]
        for arm in named(claim["claim"]):
            axis, sign, value = arm.rpartition("=")
            assert value in (known[axis] if sign else first), claim


EXTRA = {"paper/peft_method_comparison", "paper/lora_table15"}  # mini alone has some of the published methods


def named(claim):
    """The arms of a claim, each a value of the first axis or axis=value."""
    said = claim.partition(" within ")[0]
    found = RELATION.fullmatch(said)
    assert found, claim
    sides = [side for side in found.groups() if side]
    arms = [part for side in sides for part in re.split(r" [-/&] ", side)]
    numbers = [arm for arm in arms[1:] if re.fullmatch(r"[\d.]+", arm)]
    return [arm for arm in arms if arm not in numbers]


def test_a_disagreement_it_names_is_known_and_says_what_it_follows(sweep):
    _, about, _ = sweep
    named_here = about["paper"].get("disagreements") or {}
    assert set(named_here) <= set(DISAGREEMENTS)
    assert set(named_here.values()) <= set(FOLLOWED)
    assert len(list(sentences(about))) == len(named_here)


def test_its_last_trial_builds_and_mini_needs_no_network(sweep, tmp_path):
    master, about, rows = sweep
    spec = trial_spec(config := compose(rows[-1]), tmp_path)
    assert spec.id == trial_id(config)
    if about["scale"] == "mini":
        assert config.model.name_or_path == "loralab/tiny"
        assert config.data._target_.endswith((".Docstrings", ".PythonSource"))
        assert spec.trainer.max_steps <= 120
    search = search_of(master)
    for words in search.first(rows, master.metric_mode)[-1:] if search else []:
        trial_spec(compose(words), tmp_path)


def counted(*words):
    spec = trial_spec(compose(list(words)), Path())
    return count(spec.model, spec.quantization, spec.adapter)["adapter_parameters"]


QLORA = ["adapter.r=64", "quantization=nf4_double"]
TEXTBOOK = [
    "model=random",
    *("+model.config.model_type=opt", "+model.config.num_attention_heads=32"),
    *("+model.config.hidden_size=4096", "+model.config.word_embed_proj_dim=4096"),
    *("+model.config.ffn_dim=16384", "+model.config.num_hidden_layers=32"),
]


def test_the_optimizer_and_adapter_rows_of_qloras_memory_figure():
    """1152 MiB of two float32 states and 288 MiB of bfloat16 weights of 18 d r L parameters: a block of four d x d and
    two d x 4d matrices, where LLaMA 7B has 159,907,840."""
    textbook = counted(*TEXTBOOK, *QLORA)
    assert textbook == 18 * 4096 * 64 * 32
    assert (8 * textbook / 2**20, 2 * textbook / 2**20) == (1152, 288)
    layer = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert counted("model=llama_7b", *QLORA) == 64 * 32 * layer == 159_907_840


def test_lora_table_2_and_18_count_what_is_published():
    assert counted("+sweeps=paper/lora_table2@paper", "+experiment=roberta_glue/mnli") == 12 * 2 * 8 * (768 + 768)
    assert counted("+sweeps=paper/lora_table18@paper", "adapter.r=4") == 24 * 4 * (1024 + 3072)
    spec = ["+sweeps=paper/peft_method_comparison@paper", "adapter=lora", "adapter.r=32"]
    assert counted(*spec, "adapter.target_modules=[q_proj,v_proj]") == 32 * 28 * (6144 + 4096)


def test_the_page_lists_every_sweep_and_every_disagreement():
    if not PAGE.is_file():
        pytest.skip("the page lies in the repository alone")
    text = PAGE.read_text()
    for name in NAMES:
        assert f"`paper/{name}`" in text
    for key, one in DISAGREEMENTS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{key}` |"))
        assert row == f"| `{key}` | {one.paper} | {one.code} | {one.where} |"


@pytest.mark.parametrize("name", ["qlora_table4", "qlora_figure2", "qlora_figure4", "lora_without_regret_rate"])
def test_alpaca_is_asked_as_by_the_experiment(name):
    """The template of two characters \\n, whatever quotes the file has."""
    asked = compose(["+experiment=llama_alpaca"]).data
    assert compose([f"+sweeps=paper/{name}@paper"]).data.prompt == asked.prompt


def test_its_claims_are_of_forms_that_are_judged(sweep):
    _, about, _ = sweep
    claims.check_marks(about)
    for claim in about["paper"].get("claims") or []:
        assert claims.read(claim).source == claim["source"]
