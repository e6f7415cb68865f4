"""What loading needs on the host: the packed model and a little, never the dense one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

CHILD = """
import json, sys, threading, time
import torch
from transformers import AutoModelForCausalLM
from loralab.quantization.base import measure
from loralab.quantization.four_bit import FourBit
from loralab.quantization.loading import quantization_config

torch.set_num_threads(1)
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])

def load(folder):
    quantized = quantization_config(FourBit())
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized, dtype="auto")

load(sys.argv[1])  # imports, kernels, code tables
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[2])
done = True
thread.join()
print(json.dumps({"growth": peak - before, "packed": measure(model).bytes}))
"""


def write_model(folder, layers, hidden, shards):
    """A random Llama in bfloat16, written shard by shard; returns the bytes of the model and of its largest shard."""
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    noise = (torch.randn(2 * hidden, hidden, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    parts = [{} for _ in range(shards)]
    parts[0] |= {"model.embed_tokens.weight": noise[:512], "model.norm.weight": torch.ones(hidden).bfloat16()}
    for index in range(layers):
        name = f"model.layers.{index}."
        part = parts[index * shards // layers]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            part[f"{name}{norm}.weight"] = torch.ones(hidden).bfloat16()
        part |= {f"{name}self_attn.{one}_proj.weight": noise[:hidden] for one in "qkvo"}
        part |= {f"{name}mlp.{one}_proj.weight": noise for one in ("gate", "up")}
        part[f"{name}mlp.down_proj.weight"] = noise.t()
    where, sizes = {}, []
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensor.clone().contiguous() for name, tensor in part.items()}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
        sizes.append((folder / file).stat().st_size)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(sizes), max(sizes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("layers", "hidden", "least"),
    [(10, 768, 100e6), pytest.param(24, 1664, 1e9, marks=pytest.mark.slow)],
    ids=["0.1 GB", "1 GB"],
)
def test_anonymous_memory_grows_by_the_packed_model_and_two_shards_at_most(tmp_path, layers, hidden, least):
    write_model(tmp_path / "small", 1, 256, 1)
    total, shard = write_model(tmp_path / "large", layers, hidden, 8)
    assert total > least
    arguments = [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large")]
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["packed"] < 0.35 * total
    assert found["growth"] < found["packed"] + 2 * shard
