"""Adapters of equal size: the field that sets the size, found from the number of parameters."""

import pytest

from loralab.adapters.full import Full
from loralab.adapters.intrinsic import Intrinsic
from loralab.adapters.lora import LoRA
from loralab.config.build import trial_id, trial_spec
from loralab.config.compose import compose
from loralab.errors import ConfigError
from loralab.planning.budget import size_for
from loralab.planning.count import count
from loralab.quantization.none import NoQuantization

QUERY_VALUE = ["model=roberta_base", "adapter.target_modules=[query,value]"]


def spec(words, folder):
    return trial_spec(compose(words), folder)


def test_the_rank_of_the_lora_paper_is_found_from_its_count(tmp_path):
    """RoBERTa-base, query and value: 36,864 r."""
    trial = spec(QUERY_VALUE, tmp_path)
    assert size_for(294_912, trial.model, trial.adapter) == 8
    assert size_for(294_912 + 18_000, trial.model, trial.adapter) == 8  # the nearest
    assert size_for(294_912 + 19_000, trial.model, trial.adapter) == 9


@pytest.mark.parametrize("budget", [1_000, 17_408, 123_456])
def test_what_is_found_has_about_the_budget(make_model, budget):
    model, adapter = make_model("llama"), LoRA()
    if budget < 2_000:
        with pytest.raises(ConfigError, match=r"budget of 1,000 .*within 10%: r=1 has \d,\d{3}; valid"):
            size_for(budget, model, adapter)
        return
    r = size_for(budget, model, adapter)
    sizes = [count(model, NoQuantization(), LoRA(r=near))["adapter_parameters"] for near in (r - 1, r, r + 1) if near]
    assert (
        min(sizes, key=lambda size: abs(size - budget))
        == count(model, NoQuantization(), LoRA(r=r))["adapter_parameters"]
    )


def test_any_method_with_a_size_can_be_fitted_and_no_other(make_model):
    assert size_for(5_000, make_model("llama"), Intrinsic()) == 5_000
    with pytest.raises(ConfigError, match="adapter=full has no key that sets its number of parameters"):
        size_for(5_000, make_model("llama"), Full())


def test_a_configuration_asks_for_a_rank_by_its_parameters(tmp_path):
    words = [*QUERY_VALUE, "adapter.r=${loralab.rank_for:300000}"]
    assert spec(words, tmp_path).adapter.r == 8
    assert trial_id(compose(words)) == trial_id(compose([*QUERY_VALUE, "adapter.r=8"]))


def test_other_keys_may_refer_to_the_rank_that_is_found(tmp_path):
    words = [*QUERY_VALUE, "adapter.r=${loralab.rank_for:300000}", "adapter.lora_alpha=${adapter.r}"]
    assert spec(words, tmp_path).adapter.lora_alpha == 8


@pytest.mark.parametrize("budget", ["20", "0", "-5", "many", "3e5"])
def test_a_budget_that_nothing_meets_is_told_with_its_key(tmp_path, budget):
    with pytest.raises(ConfigError, match=r"^adapter.r: (a budget of 20 parameters is met by no|loralab.rank_for:)"):
        spec([f"adapter.r=${{loralab.rank_for:{budget}}}"], tmp_path)
