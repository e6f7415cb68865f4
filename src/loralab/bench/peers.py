"""The same trials in PEFT, under Hugging Face's Trainer and under Lightning, as their documentation has one write them.

Nothing is logged or saved. The base is loaded and quantized once a process; each trial puts its adapter on and takes
it off again.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from loralab.bench.layer import linear4bit
from loralab.bench.measurements import Clock
from loralab.bench.processes import Row
from loralab.data.batches import collate
from loralab.data.encoding import Example
from loralab.models.architecture import auto_class
from loralab.models.pretrained import Random

Rows = list[Example]
SILENT: Row = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
QUIET: Row = {
    **{"prediction_loss_only": True, "remove_unused_columns": False, "dataloader_num_workers": 0},
    **{"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True},
}


class Peft:
    """A base, quantized but where ``dense``, and the rows in token ids, in the order in which they are trained on.
    ``setup``: device, pad, rows (a file, or each request names its own), model (a folder) or config (of a random base);
    ``medium``: torch's matmul precision."""

    def __init__(self, setup: Row) -> None:
        if setup.get("medium"):
            torch.set_float32_matmul_precision("medium")
        self.device, self.pad = setup["device"], setup["pad"]
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.base: Any = _random(setup, dtype) if "config" in setup else _loaded(setup, dtype)
        for module in self.base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes 0.50: on such a CPU the first validation repacks the weight for a kernel without
                # autograd, and every later trial would train on wrong gradients
                module.support_avx512bf16_for_cpu = False
        if "rows" in setup:
            self._read(setup["rows"])

    def _read(self, path: str) -> None:
        stored = json.loads(Path(path).read_text("utf-8"))
        self.train, self.validation = (
            [Example(ids, labels, 0) for ids, labels in stored[split]] for split in ("train", "validation")
        )

    def answer(self, request: Row) -> Row:
        """{steps: seconds of each but the first, losses, trainable_parameters, peak_bytes, launches}."""
        if "rows" in request:
            self._read(request["rows"])
        torch.manual_seed(0)
        lora_keys = {key: request[key] for key in ("r", "lora_alpha", "target_modules")}
        model: Any = get_peft_model(self.base, LoraConfig(**lora_keys, task_type="CAUSAL_LM"))
        if request.get("same_start"):
            start_as_loralab(model)
        clock, losses = Clock(self.device, request["steps"], request.get("profiled", 0)), list[Tensor]()
        hook = model.register_forward_hook(lambda _, __, out: losses.append(out.loss.detach()))
        self.fit(model, request, self.train[: request["steps"] * request["batch"]], clock)
        hook.remove()
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.base = model.unload()
        return {
            "steps": clock.steps(),
            "losses": torch.stack(losses[: request["steps"]]).tolist(),  # then those of the validation
            "trainable_parameters": trainable,
            "peak_bytes": torch.cuda.max_memory_allocated() if self.device == "cuda" else None,
            "launches": clock.launches,
        }

    def fit(self, model: Any, request: Row, rows: Rows, clock: Clock) -> None:
        """AdamW at a constant rate, clipping at 1; then the loss over the validation rows."""
        raise NotImplementedError

    def collate(self, rows: Rows) -> dict[str, Tensor]:
        """Each batch padded to its longest row."""
        return collate(rows, "causal_lm", self.pad)


def _loaded(setup: Row, dtype: torch.dtype) -> Any:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(
        setup["model"],
        quantization_config=None if setup.get("dense") else quantization,
        dtype=dtype,
        device_map={"": setup["device"]},
    )


def _random(setup: Row, dtype: torch.dtype) -> Any:
    """A model drawn on the device; unless ``dense``, every linear layer but its output is packed there in NF4, double
    quantization."""
    device = setup["device"]
    with torch.device(device):
        prepared = Random(config=setup["config"], dropout=0.0).prepared_config(None)
        model = auto_class("causal_lm").from_config(prepared, dtype=dtype)
    if setup.get("dense"):
        return model
    output = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not output:
            model.set_submodule(name, linear4bit(layer, dtype).to(device))
    model.is_loaded_in_4bit = True  # by which PEFT tells these layers from dense ones
    return model


class WithTrainer(Peft):
    """Hugging Face's Trainer with its default AdamW (torch's fused one); with ``liger`` over Liger's kernels, which
    stay in the base for all later requests."""

    def fit(self, model: Any, request: Row, rows: Rows, clock: Clock) -> None:
        class StepTimes(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock()

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=request["steps"],
                per_device_train_batch_size=request["batch"],
                per_device_eval_batch_size=request["batch"],
                learning_rate=request["lr"],
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                train_sampling_strategy="sequential",  # the rows are in their order already
                use_cpu=self.device == "cpu",
                bf16=self.device == "cuda",
                use_liger_kernel=bool(request.get("liger")),
                dataloader_pin_memory=self.device == "cuda",
                **QUIET,
            )
            trainer = Trainer(
                model, arguments, self.collate, rows, eval_dataset=self.validation, callbacks=[StepTimes()]
            )
            trainer.train()
            trainer.evaluate()


class WithLightning(Peft):
    """A plain LightningModule around the PEFT model, with torch's default AdamW."""

    def fit(self, model: Any, request: Row, rows: Rows, clock: Clock) -> None:
        from lightning.pytorch import LightningModule, Trainer
        from torch.utils.data import DataLoader

        class Module(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
                loss: Tensor = self.model(**batch).loss
                return loss

            def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
                self.log("val_loss", self.model(**batch).loss, batch_size=len(batch["labels"]))

            def on_train_batch_end(self, *_: Any) -> None:
                clock()

            def configure_optimizers(self) -> torch.optim.Optimizer:
                trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
                return torch.optim.AdamW(trained, lr=request["lr"], weight_decay=0.0)

        model.train()
        on_card = self.device == "cuda"
        trainer = Trainer(
            accelerator="gpu" if on_card else "cpu",
            devices=1,
            precision="bf16-mixed" if on_card else "32-true",
            max_steps=request["steps"],
            gradient_clip_val=1.0,
            num_sanity_val_steps=0,
            **SILENT,
        )
        splits: tuple[Any, Any] = rows, self.validation  # the former is one epoch, at whose end the latter's turn is
        train, validation = (DataLoader(split, request["batch"], collate_fn=self.collate) for split in splits)
        trainer.fit(Module(), train, validation)


def start_as_loralab(model: Any, seed: int = 0) -> None:
    """Gives every A of a PEFT model the values that loralab would draw."""
    from loralab.adapters.base import generator_for
    from loralab.adapters.low_rank import LoRADelta

    for name, layer in model.named_modules():
        if "default" in getattr(layer, "lora_A", ()):
            a = layer.lora_A["default"].weight
            delta = LoRADelta(a.shape[1], 1, a.shape[0], 1.0, 0.0, torch.device("cpu"))
            delta.draw("kaiming", generator_for(seed, name.removeprefix("base_model.model.")))
            with torch.no_grad():
                a.copy_(delta.lora_A)
