"""What transformers and PEFT alone make of a task: row by row, no row is padded, and nothing of loralab is imported."""

import inspect
import json

import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

CLASSIFIER = transformers.AutoModelForSequenceClassification
AUTO = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "seq2seq_lm": transformers.AutoModelForSeq2SeqLM,
    **dict.fromkeys(("sequence_classification", "pairs", "regression"), CLASSIFIER),
}


def load(folder, task, adapter=None, weights=None, labels=None, attention="eager"):
    """The checkpoint, with other values for some ``weights``, with a PEFT adapter's folder where there is one."""
    more = {} if labels is None else {"num_labels": labels}
    config = transformers.AutoConfig.from_pretrained(folder, **more)
    model = AUTO[task].from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation=attention)
    model.config.use_cache = False
    with torch.no_grad():
        for name, value in (weights or {}).items():
            model.get_parameter(name).copy_(value)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter, is_trainable=True)).eval()


def rows(tokenizer, path, task, names=()):
    """[(input ids, label ids)] of a file of q and a, or of t and y, where pairs (t and u) bring token_type_ids."""
    end, found = [tokenizer.eos_token_id], []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if task == "pairs":
            made = tokenizer(row["t"], row["u"])
            found.append((made["input_ids"], [names.index(row["y"])], made["token_type_ids"]))
            continue
        source = tokenizer(row["q"] if "q" in row else row["t"], add_special_tokens=False)["input_ids"]
        if task in ("sequence_classification", "regression"):
            found.append((source, [row["y"] if task == "regression" else names.index(row["y"])]))
            continue
        target = tokenizer(row["a"], add_special_tokens=False)["input_ids"] + end
        found.append((source, target) if task == "seq2seq_lm" else (source + target, [-100] * len(source) + target))
    return found


def logits(model, row, task):
    """(logits (n, V or classes), targets (n,)) of what one row has to predict."""
    ids, labels = (torch.tensor([part]) for part in row[:2])
    if task in ("sequence_classification", "pairs", "regression"):
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if len(row) > 2 and reads_types(model):
            given["token_type_ids"] = torch.tensor([row[2]])
        return model(**given).logits, labels[0]
    if task == "seq2seq_lm":
        start = model.config.decoder_start_token_id
        fed = torch.cat([torch.tensor([[start]]), labels[:, :-1]], 1)
        mask = torch.ones_like(ids)
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=fed).logits[0], labels[0]
    made = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
    kept = labels[0, 1:] != -100
    return made[kept], labels[0, 1:][kept]


def reads_types(model):
    """Whether transformers would hand it token_type_ids: it takes them, and has more than one of them."""
    base = getattr(model, "base_model", model).model if isinstance(model, PeftModel) else model
    takes = "token_type_ids" in inspect.signature(base.forward).parameters
    return takes and getattr(model.config, "type_vocab_size", 2) > 1


def loss(made, targets):
    """Summed negative log-likelihood, or of scores the squared error."""
    if targets.is_floating_point():
        return F.mse_loss(made.squeeze(-1), targets.to(made), reduction="sum")
    return F.cross_entropy(made, targets, reduction="sum")


def score(model, given, task):
    """[(summed loss, right predictions, targets)] of each row; of scores (squared error, prediction, 1)."""
    found = []
    with torch.no_grad():
        for row in given:
            made, targets = logits(model, row, task)
            right = float(made) if task == "regression" else int((made.argmax(-1) == targets).sum())
            found.append((float(loss(made.double(), targets)), right, len(targets)))
    return found


def gradients(model, given, task):
    """{PEFT's name: gradient} of one step over the rows, whose loss is the mean over all their targets."""
    model.zero_grad()
    parts = [logits(model, row, task) for row in given]
    total = sum(loss(made.float(), targets) for made, targets in parts)
    (total / sum(len(targets) for _, targets in parts)).backward()
    named = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None]
    return {name.replace(".default", "").replace("modules_to_save.", ""): grad for name, grad in named}


def put(model, folder, state):
    """Other values for the trained parameters of a PEFT model."""
    save_file(state, folder / "state.safetensors")
    result = set_peft_model_state_dict(model, load_file(folder / "state.safetensors"))
    assert not result.unexpected_keys, result.unexpected_keys


def complete(model, tokenizer, prompt, count=24):
    """The greedy continuation."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    words = {"do_sample": False, "max_new_tokens": count, "pad_token_id": tokenizer.pad_token_id}
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **words)[0]
    fresh = out if model.config.is_encoder_decoder else out[ids.shape[1] :]
    return tokenizer.decode(fresh, skip_special_tokens=True)
