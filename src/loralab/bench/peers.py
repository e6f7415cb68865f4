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
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from loralab.bench.worker import Clock, Row
from loralab.data.batches import collate
from loralab.data.encoding import Example

Rows = list[Example]


class Peft:
    """A quantized base and the rows in token ids, in the order in which they are trained on."""

    def __init__(self, job: Row) -> None:
        if job["medium"]:
            torch.set_float32_matmul_precision("medium")
        self.device, self.pad = job["device"], job["pad"]
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        self.base = AutoModelForCausalLM.from_pretrained(
            job["model"],
            quantization_config=None if job["dense"] else quantization,
            dtype=dtype,
            device_map={"": self.device},
        )
        for module in self.base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes 0.50: on such a CPU the first validation repacks the weight for a kernel without
                # autograd, and every later trial would train on wrong gradients
                module.support_avx512bf16_for_cpu = False
        stored = json.loads(Path(job["rows"]).read_text("utf-8"))
        self.train, self.validation = (
            [Example(ids, labels, 0) for ids, labels in stored[split]] for split in ("train", "validation")
        )

    def trial(self, trial: Row) -> Row:
        """{steps: seconds of each but the first, losses, trainable_parameters}."""
        torch.manual_seed(0)
        config = LoraConfig(
            r=trial["r"],
            lora_alpha=trial["lora_alpha"],
            target_modules=trial["target_modules"],
            task_type="CAUSAL_LM",
        )
        model: Any = get_peft_model(self.base, config)
        if trial.get("same_start"):
            start_as_loralab(model)
        clock, losses = Clock(self.device), list[Tensor]()
        watch = model.register_forward_hook(lambda _, __, out: losses.append(out.loss.detach()))
        self.fit(model, trial, self.train[: trial["steps"] * trial["batch"]], clock)
        watch.remove()
        counted = sum(one.numel() for one in model.parameters() if one.requires_grad)
        self.base = model.unload()
        seen = torch.stack(losses[: trial["steps"]]).tolist()  # then those of the validation
        return {"steps": clock.steps(), "losses": seen, "trainable_parameters": counted}

    def fit(self, model: Any, trial: Row, rows: Rows, clock: Clock) -> None:
        """AdamW at a constant rate, clipping at 1; then the loss over the validation rows."""
        raise NotImplementedError

    def collate(self, rows: Rows) -> dict[str, Tensor]:
        """Each batch padded to its longest row."""
        return collate(rows, "causal_lm", self.pad)


class WithTrainer(Peft):
    """Hugging Face's Trainer with its default AdamW (torch's fused one)."""

    def fit(self, model: Any, trial: Row, rows: Rows, clock: Clock) -> None:
        class Watch(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock()

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=trial["steps"],
                per_device_train_batch_size=trial["batch"],
                per_device_eval_batch_size=trial["batch"],
                learning_rate=trial["lr"],
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                train_sampling_strategy="sequential",  # the rows are in their order already
                prediction_loss_only=True,
                remove_unused_columns=False,
                dataloader_num_workers=0,
                dataloader_pin_memory=self.device == "cuda",
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=self.device == "cpu",
                bf16=self.device == "cuda",
            )
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=rows,
                eval_dataset=self.validation,
                data_collator=self.collate,
                callbacks=[Watch()],
            )
            trainer.train()
            trainer.evaluate()


class WithLightning(Peft):
    """A plain LightningModule around the PEFT model, with torch's default AdamW."""

    def fit(self, model: Any, trial: Row, rows: Rows, clock: Clock) -> None:
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
                trained = [one for one in self.parameters() if one.requires_grad]
                return torch.optim.AdamW(trained, lr=trial["lr"], weight_decay=0.0)

        model.train()
        trainer = Trainer(
            accelerator="gpu" if self.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if self.device == "cuda" else "32-true",
            max_steps=trial["steps"],
            gradient_clip_val=1.0,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Module()
        trainer.fit(module, DataLoader(rows, trial["batch"], collate_fn=self.collate))  # type: ignore[arg-type]
        trainer.limit_val_batches = 1.0
        validation: Any = DataLoader(self.validation, trial["batch"], collate_fn=self.collate)  # type: ignore[arg-type]
        trainer.validate(module, validation, verbose=False)


def start_as_loralab(model: Any, seed: int = 0) -> None:
    """Gives every A of a PEFT model the values that loralab would draw."""
    from loralab.adapters.base import generator_for
    from loralab.adapters.lora import LoRADelta

    for name, layer in model.named_modules():
        if "default" in getattr(layer, "lora_A", ()):
            a = layer.lora_A["default"].weight
            delta = LoRADelta(a.shape[1], 1, a.shape[0], 1.0, 0.0, torch.device("cpu"))
            delta.draw("kaiming", generator_for(seed, name.removeprefix("base_model.model.")))
            with torch.no_grad():
                a.copy_(delta.lora_A)
