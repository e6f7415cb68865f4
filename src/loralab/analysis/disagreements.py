"""Where a paper and its official code, or its own counting, differ; which of the two a sweep follows, it says itself.

Read in the papers' full text and the authors' repositories: microsoft/LoRA (``examples/NLU``, ``examples/NLG``,
``loralib``), artidoro/qlora (``qlora.py``, ``scripts``) and bitsandbytes 0.50.2. A sweep file names those that concern
it under ``sweep.paper.disagreements``: ``{roberta_base_alpha: paper}``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FOLLOWED = ("paper", "code", "count", "both", "neither")  # both: as values of an axis


@dataclass(frozen=True)
class Disagreement:
    """``paper``: what it says, and in which table; ``code``: what the official code does, or what counting gives;
    ``where`` that was read."""

    paper: str
    code: str
    where: str


LORA, QLORA = "LoRA (arXiv 2106.09685v2)", "QLoRA (arXiv 2305.14314)"
DISAGREEMENTS = {
    "roberta_base_alpha": Disagreement(
        f"{LORA}, table 9: lora_alpha = 8", "lora_alpha = 16", "microsoft/LoRA examples/NLU/roberta_base_*.sh"
    ),
    "roberta_base_batch": Disagreement(
        f"{LORA}, table 9: batch size 16 or 32, by task",
        "the same number for each of 8 GPUs (CoLA: of 2): 128 or 256 in all (CoLA: 64)",
        "microsoft/LoRA examples/NLU/roberta_base_*.sh",
    ),
    "deberta_rank": Disagreement(
        f"{LORA}, table 10: r = 8, lora_alpha = 8",
        "r = 16, lora_alpha = 32, with which alone the 4.7M parameters of table 2 are met (4,718,592)",
        "microsoft/LoRA examples/NLU/deberta_v2_xxlarge_*.sh; counted",
    ),
    "deberta_cola_rte_rate": Disagreement(
        f"{LORA}, table 10: learning rate 1e-4 (CoLA), 2e-4 (RTE)",
        "1.3e-4 and 2.6e-4",
        "microsoft/LoRA examples/NLU/deberta_v2_xxlarge_{cola,rte}.sh",
    ),
    "roberta_large_cola_rate": Disagreement(
        f"{LORA}, table 9: learning rate 2e-4", "3e-4", "microsoft/LoRA examples/NLU/roberta_large_cola.sh"
    ),
    "roberta_large_stsb": Disagreement(
        f"{LORA}, table 9: learning rate 2e-4, batch size 8, 30 epochs, 512 tokens",
        "3e-4, 4, 10 epochs, 128 tokens",
        "microsoft/LoRA examples/NLU/roberta_large_stsb.sh",
    ),
    "roberta_large_sst2": Disagreement(
        f"{LORA}, table 9: batch size 4, 128 tokens", "8, 512", "microsoft/LoRA examples/NLU/roberta_large_sst2.sh"
    ),
    "e2e_length_penalty": Disagreement(
        f"{LORA}, table 11: length penalty 0.9", "0.8", "microsoft/LoRA examples/NLG/README.md"
    ),
    "init_of_a": Disagreement(
        f"{LORA}, section 4.1: A is drawn from a Gaussian", "kaiming_uniform", "microsoft/LoRA loralib/layers.py"
    ),
    "roberta_base_count": Disagreement(
        f"{LORA}, table 2: 0.3M trained parameters",
        "0.8M in its README: 294,912 without and 887,042 with the new head",
        "microsoft/LoRA README.md; counted",
    ),
    "gpt2_count": Disagreement(
        f"{LORA}, table 3: 0.35M (medium) and 0.77M (large) trained parameters",
        "393,216 and 737,280 with r = 4 on queries and values; the paper's numbers are 0.1% of the model's",
        "counted",
    ),
    "prefix_layer_count": Disagreement(
        f"{LORA}, table 15: PrefixLayer with 8 + 8 tokens has 20.2M parameters",
        "layers x width x tokens = 18,874,368",
        "counted; so are the other sizes of PrefixLayer, 1% to 7% off",
    ),
    "gpt3_r64_count": Disagreement(
        f"{LORA}, table 15: 603.8M with r = 64 on all four matrices", "603,979,776, 604.0M", "counted"
    ),
    "roberta_weight_decay": Disagreement(
        f"{LORA}, table 9: names no weight decay", "0.1 in all 16 scripts", "microsoft/LoRA examples/NLU/roberta_*.sh"
    ),
    "deberta_warmup": Disagreement(
        f"{LORA}, table 10: warm-up ratio 0.1",
        "steps by task: 1000, 1000, ratio 0.1 (MRPC), 100, 500, 10000, 50, 100",
        "microsoft/LoRA examples/NLU/deberta_v2_xxlarge_*.sh",
    ),
    "seeds": Disagreement(
        f"{LORA}: the median of 5 seeds (table 2), the mean of 3 (table 3), which it does not name",
        "every script has one seed: 0, and 110 for text generation",
        "microsoft/LoRA examples/NLU/*.sh, examples/NLG/README.md",
    ),
    "gpt3_37m_ranks": Disagreement(
        f"{LORA}, section D.4: 37.7M parameters with r_q = r_k = r_v = r_o = 2",
        "that is 18.8M; table 15 has 37.7M with r = 4",
        "table 15; counted",
    ),
    "table4_mixed_rows": Disagreement(
        f"{LORA}, table 4: one row a method",
        "the 4.7M row is r_v = 2 alone, and the 37.7M row has 74.0 of r = 4 on four matrices, 91.6 of r = 8 on two",
        "table 15",
    ),
    "qlora_table4_mean": Disagreement(
        f"{QLORA}, table 4: the mean of NF4 + double quantization is 53.1, above BFloat16's 53.0",
        "its own cells have the means 52.99 and 53.04",
        "counted",
    ),
    "nf4_equation": Disagreement(
        f"{QLORA}, equation 4: the values of NF4 are means of neighbouring quantiles",
        "that gives neither its 16 values nor finite ends; the values are create_normal_map(offset=0.9677083)",
        "bitsandbytes functional.py; counted",
    ),
    "guanaco_dropout": Disagreement(
        f"{QLORA}, appendix A.1: 0.05 for small models and none for large ones; B.2: 0.1 up to 13B, 0.05 above",
        "0.1 (7B), 0.05 (13B, 33B, 65B)",
        "artidoro/qlora scripts/finetune_guanaco_*.sh",
    ),
    "guanaco_warmup": Disagreement(
        f"{QLORA}, appendix B.2: a constant learning rate",
        "--warmup_ratio 0.03 beside a constant schedule, which transformers does not warm up",
        "artidoro/qlora scripts/finetune_guanaco_*.sh; run",
    ),
    "double_quant_dtype": Disagreement(
        f"{QLORA}, section 3: the second quantization is to 8-bit floats",
        "bitsandbytes' signed dynamic 8-bit map",
        "bitsandbytes functional.py",
    ),
    "qlora_batch_of_33b_65b": Disagreement(
        f"{QLORA}, section 5: twice the batch size for 33B and 65B",
        "table 9: twice for 33B, four times for 65B, and the same for OASST1",
        "table 9",
    ),
    "guanaco_7b_size": Disagreement(
        f"{QLORA}, table 1: Guanaco 7B takes 6 GB", "5 GB in its text and table 6", "table 6"
    ),
    "qlora_lora_modules": Disagreement(
        f"{QLORA}, section 4: LoRA on all layers",
        "the scripts' --lora_modules all is no option of qlora.py, which adapts all linear layers anyway",
        "artidoro/qlora scripts, qlora.py",
    ),
}


def sentences(about: Mapping[str, Any]) -> Iterator[str]:
    """What the report says of each disagreement that a sweep names. ``about``: what sweep.json says."""
    named = (about.get("paper") or {}).get("disagreements")
    for key, followed in (named if isinstance(named, Mapping) else {}).items():
        if (known := DISAGREEMENTS.get(key)) is not None:
            yield (
                f"Paper and code disagree ({key}): {known.paper}; official code or count: {known.code} "
                f"({known.where}). This sweep follows: {followed}"
            )
