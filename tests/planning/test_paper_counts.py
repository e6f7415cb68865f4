"""``count`` gives the parameter counts that papers and PEFT's own comparison publish, without weights."""

import pytest

from loralab.config.build import build
from loralab.config.compose import compose, plain
from loralab.planning.count import count

QV, QKVO = "[q_proj,v_proj]", "[q_proj,k_proj,v_proj,out_proj]"
MLP = "[gate_proj,up_proj,down_proj]"

# LoRA's tables 2, 3, 4 and 15 (arXiv:2106.09685): GPT-3 with W_q and W_v apart, GPT-2 with both in c_attn
LORA_PAPER = {
    "model=roberta_base adapter.r=8 adapter.target_modules=[query,value]": 294_912,
    "model=roberta_large adapter.r=8 adapter.target_modules=[query,value]": 786_432,
    "model=deberta_v2_xxlarge adapter.r=16 adapter.target_modules=[query_proj,value_proj]": 4_718_592,
    f"model=gpt3 adapter.r=1 adapter.target_modules={QV}": 4_718_592,
    f"model=gpt3 adapter.r=8 adapter.target_modules={QV}": 37_748_736,
    f"model=gpt3 adapter.r=64 adapter.target_modules={QV}": 301_989_888,
    f"model=gpt3 adapter.r=64 adapter.target_modules={QKVO}": 603_979_776,
    "model=gpt3 adapter=bottleneck adapter.variant=houlsby adapter.bottleneck_size=1": 7_078_080,
    "model=gpt3 adapter=bottleneck adapter.variant=houlsby adapter.bottleneck_size=64": 304_361_472,
    "model=gpt3 adapter=prompt adapter.num_virtual_tokens=264": 3_244_032,
    "model=gpt2_medium adapter=last_layer adapter.layers=2": 25_192_448,
    "model=gpt2_medium adapter=bottleneck adapter.variant=adapterl adapter.bottleneck_size=6": 368_784,
    "model=gpt2_large adapter=bottleneck adapter.variant=adapterl adapter.bottleneck_size=248": 23_002_848,
    "model=roberta_base adapter=bitfit": 102_144,
}
# counted by hand from the architectures of the models that the shipped experiments train
EXPERIMENTS = {
    "model=distilbert adapter.r=4 adapter.target_modules=[q_lin,v_lin]": 73_728,
    "model=distilbert adapter.r=8 adapter.target_modules=all-linear": 663_552,
    "model=flan_t5_small adapter.r=32 adapter.target_modules=[q,v]": 1_376_256,
    "model=flan_t5_base adapter.r=8 adapter.target_modules=[q,v]": 884_736,
    "model=flan_t5_large adapter.r=16 adapter.target_modules=[q,v]": 4_718_592,
    "model=llama_7b adapter.r=64": 159_907_840,
}
# num_trainable_params of PEFT's method_comparison/MetaMathQA, Llama 3.2 3B
PEFT_COMPARISON = {
    f"model=llama32_3b adapter.r=32 adapter.target_modules={QV}": 9_175_040,
    f"model=llama32_3b adapter.r=64 adapter.target_modules={QV}": 18_350_080,
    f"model=llama32_3b adapter.r=10 adapter.target_modules={MLP}": 9_461_760,
    f"model=llama32_3b adapter.r=32 adapter.target_modules={QV} adapter.use_dora=true": 9_289_728,
    f"model=llama32_3b adapter=vera adapter.r=256 adapter.target_modules={QV}": 129_024,
    f"model=llama32_3b adapter=lora_fa adapter.r=32 adapter.target_modules={QV}": 3_670_016,
    "model=llama32_3b adapter=ia3": 286_720,
    "model=llama32_3b adapter=prompt adapter.num_virtual_tokens=200": 614_400,
    "model=llama32_3b adapter=prefix adapter.num_virtual_tokens=50": 2_867_200,
    "model=llama32_3b adapter=full": 3_212_749_824,
}


SLOW = {  # another size of the same method and model is beside it
    f"model=gpt3 adapter.r=1 adapter.target_modules={QV}",
    f"model=gpt3 adapter.r=64 adapter.target_modules={QV}",
    "model=gpt3 adapter=bottleneck adapter.variant=houlsby adapter.bottleneck_size=1",
    f"model=llama32_3b adapter.r=32 adapter.target_modules={QV}",
}


@pytest.mark.parametrize(
    ("overrides", "published"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] if case[0] in SLOW else [])
        for case in [*LORA_PAPER.items(), *EXPERIMENTS.items(), *PEFT_COMPARISON.items()]
    ],
)
def test_count_is_the_published_one(overrides, published):
    config = plain(compose(overrides.split()))
    specs = [build(config[group], group) for group in ("model", "quantization", "adapter")]
    assert count(*specs)["adapter_parameters"] == published
