"""What a model does is read off its graph: who sees later tokens, and who reads positions."""

import pytest

from loralab.errors import ConfigError
from loralab.forward.graph import check_causal, reached
from loralab.models.pretrained import auto_class


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_a_decoder_passes_and_no_gradient_comes_from_a_later_token(load_base, inputs, family):
    model = load_base(family).model
    check_causal(model)
    (found,) = reached(model, inputs(), slice(0, 5))
    assert not found[:, 5:].any()
    assert found[:, :5].all()


def test_an_encoder_is_named_with_its_key(make_model):
    spec = make_model("roberta", {"is_decoder": False}, task="causal_lm")
    model = auto_class("causal_lm").from_config(spec.architecture())
    with pytest.raises(ConfigError, match=r"model.task=causal_lm.*is_decoder=False.*is_decoder: true in its config"):
        check_causal(model)
    model = auto_class("causal_lm").from_config(make_model("roberta", {"is_decoder": True}).architecture())
    check_causal(model)
    assert model.training
