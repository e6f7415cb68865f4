"""Load or build a base model, quantized as its weights stream in."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from loralab.adapters.hooks import AdapterHooks
from loralab.errors import ConfigError
from loralab.models import architecture, prequantized, weights
from loralab.models.architecture import auto_class
from loralab.models.originals import stored_weights
from loralab.models.tokenizer import load_tokenizer
from loralab.models.weights import explained
from loralab.quantization.base import Quantizer, dense_weight
from loralab.quantization.loading import convert_model, quantization_config
from loralab.records import fingerprints
from loralab.spec import Count, Natural, Share, Whole, spec

log = logging.getLogger(__name__)

SHIPPED, SHIPPED_FOLDER = fingerprints.SHIPPED, fingerprints.SHIPPED_FOLDER
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


@spec("model")
class Pretrained:
    """A checkpoint: a hub id, a local folder, or loralab/tiny, the code model that ships with this package."""

    LONGEST: ClassVar[int] = 512  # tokens of a row, where max_length is null and the base allows more

    name_or_path: str = SHIPPED
    task: Literal["causal_lm", "seq2seq_lm", "sequence_classification"] = "causal_lm"
    # tokens of prompt and target together; null: what the base has, at most LONGEST
    max_length: Annotated[Whole, Ge(2)] | None = None
    # of the weights that are not quantized; auto: the checkpoint's
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    attn_implementation: architecture.Attention = "auto"  # sdpa where the architecture has it, else eager
    dropout: Literal["keep"] | Share = "keep"  # the base's own dropout: keep, or one number for all of it
    # blocks: each block by torch.compile; graphs: as CUDA graphs besides
    compile: Literal["none", "blocks", "graphs"] = "none"
    tokenizer: str | None = None  # null: beside the weights
    num_labels: Annotated[Count, Le(2**31 - 1)] | None = None  # null: from the data
    trust_remote_code: bool = False
    config: dict[str, Any] = field(default_factory=dict)  # the architecture, so that counting needs no weights

    @property
    def path(self) -> str:
        """What transformers is asked for."""
        return _path(self.name_or_path)

    @cached_property
    def length(self) -> int:
        """Tokens of the longest row: max_length, or what it stands for where it is null.

        Raises ConfigError where max_length exceeds the positions that the base was built with.
        """
        return architecture.length(self.max_length, self.LONGEST, self.architecture())

    def attention(self, config: Any) -> str | None:
        """The attention that a model of ``config`` is built with; None: what transformers chooses."""
        return architecture.attention(self.attn_implementation, self.task, config)

    @property
    def _named(self) -> str:
        return f"model.name_or_path={self.name_or_path!r}" if self.name_or_path else "model=random"

    @property
    def _config_key(self) -> str:
        """What errors put before a key of the architecture."""
        return f"{self._named}: its config's "

    def _building(self) -> AbstractContextManager[None]:
        return explained(f"{self._named}: no model for model.task={self.task} can be built from model.config")

    def check(self) -> None:
        """Raises ConfigError where a local folder cannot be a base model, before anything heavy happens."""
        folder = weights.find("model.name_or_path", self.name_or_path, self.path)
        if folder is None:
            return  # a hub id
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{self._named}: the folder holds no config.json")
        stored = weights.read_json(folder / "config.json").get("quantization_config")
        if not isinstance(stored, dict | None):
            raise ConfigError(f"{folder / 'config.json'}: quantization_config={stored!r}; valid: an object, or none")
        if not any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES):
            raise ConfigError(
                f"{self._named}: the folder holds no weights (*.safetensors); "
                "model=random draws some from its config.json"
            )

    def fingerprint(self) -> str | None:
        """16 hex digits of the weights as they lie on disk; None for a hub id that is not downloaded yet."""
        return fingerprints.of_pretrained(self.name_or_path)

    def tokenizer_fingerprint(self) -> str | None:
        """Of the tokenizer's files, likewise."""
        return fingerprints.of_tokenizer(self.tokenizer or self.name_or_path)

    def architecture(self) -> Any:
        """The transformers config: a named model's own, which needs no network, else the checkpoint's.

        Raises ConfigError for a key of ``config`` that is not the checkpoint's.
        """
        if "model_type" in self.config:
            return architecture.from_keys(dict(self.config))
        return self._stored_config()

    def _stored_config(self) -> Any:
        from transformers import AutoConfig

        with explained(f"{self._named} cannot be loaded", self.path):
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        architecture.refuse_other(self._named, self.config, config)
        return config

    def class_names(self) -> list[str]:
        """The classes of the checkpoint's own head, in its order; transformers' LABEL_0 where its config names none."""
        try:
            named = self._stored_config().id2label
        except ConfigError:  # loading says why
            return []
        return [str(named[place]) for place in sorted(named)]

    def prepared_config(self, num_labels: int | None) -> Any:
        """The config a model of this spec is built with: dropout set, labels counted."""
        config = self._stored_config()
        return self._adjust(config, num_labels)

    def _adjust(self, config: Any, num_labels: int | None) -> Any:
        weights.check_sizes(config, self._config_key)
        if self.task == "sequence_classification":
            config.num_labels = self.num_labels or num_labels or config.num_labels
        if self.dropout != "keep":
            for key in [key for key in vars(config) if "dropout" in key or key.endswith("_pdrop")]:
                if isinstance(getattr(config, key), int | float):
                    setattr(config, key, float(self.dropout))
        if self.task == "seq2seq_lm" and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = config.pad_token_id or 0
        if hasattr(config, "use_cache"):
            config.use_cache = False  # training never reads it; generation asks for it
        return config

    def weights(self, config: Any, quantizer: Quantizer, dtype: torch.dtype | str, device: str) -> nn.Module:
        """The model on the host or on ``device``, its Linear layers quantized one by one while they are read."""
        held = prequantized.held(self._named, self.path, config, quantizer)
        stored = weights.check_files(self._named, self.path, held is not None)
        with explained(f"{self._named} cannot be loaded", self.path), weights.quiet_loading():
            model, info = auto_class(self.task).from_pretrained(
                self.path,
                config=config,
                dtype=dtype,
                attn_implementation=self.attention(config),
                trust_remote_code=self.trust_remote_code,
                quantization_config=quantization_config(quantizer, device, held),
                ignore_mismatched_sizes=True,  # refuse_differences names them
                output_loading_info=True,
            )
        if not stored:  # downloaded by now
            stored = weights.check_files(self._named, self.path, held is not None)
        if dtype == "auto":
            weights.name_narrowed(self._named, stored, model)
        if held is not None:
            info["unexpected_keys"] = {key for key in info["unexpected_keys"] if not held.is_read(key)}
        new = weights.refuse_differences(self._named, model, info, self.task)
        if new:
            log.info("%s has no %s: drawn by the seed", self._named, ", ".join(sorted(new)))
        AdapterHooks.of(model).new_parameters = frozenset(new)
        AdapterHooks.of(model).originals = partial(self._originals, self.fingerprint())
        return model  # type: ignore[no-any-return]

    def _originals(self, fingerprint: str | None, model: nn.Module, names: list[str]) -> Iterator[Tensor]:
        """Raises ConfigError where the files are no longer those that were loaded (``fingerprint``)."""
        if self.fingerprint() != fingerprint:
            raise ConfigError(
                f"{self._named}: its files have changed since the base was loaded, and the start of the adapter is "
                "computed from both; valid: weights that stay what they are"
            )
        return stored_weights(self._named, self.path, model, names)

    def load_tokenizer(self) -> Any:
        """The tokenizer, with a padding token (the end-of-text token where it has none of its own)."""
        key, name = "model.tokenizer", self.tokenizer
        if name is None:
            key, name = "model.name_or_path", self.name_or_path
        return load_tokenizer(key, name, _path(name), self.trust_remote_code)


@spec("model")
class Random(Pretrained):
    """Random weights for an architecture: ``name_or_path`` a folder with a config.json, or ``config`` keys of one."""

    LONGEST: ClassVar[int] = 256

    name_or_path: str = ""
    tokenizer: str | None = SHIPPED
    draw: Annotated[Natural, Le(2**63 - 1)] = 0  # seed of the weights; trials of different seeds share the base
    # cpu: the same weights on every machine; device: where the run is, other values there
    drawn_on: Literal["cpu", "device"] = "cpu"

    def check(self) -> None:
        if self.name_or_path and not (Path(self.path) / "config.json").is_file():
            raise ConfigError(f"model.name_or_path={self.name_or_path!r}: there is no config.json in that folder")

    def fingerprint(self) -> str | None:
        return fingerprints.of_random(asdict(self))

    def architecture(self) -> Any:
        stored = (
            weights.read_json(Path(self.path) / "config.json") if self.name_or_path else dict(architecture.SMALL_LLAMA)
        )
        stored.pop("quantization_config", None)
        if "model_type" in self.config and self.config["model_type"] != stored.get("model_type"):
            stored = {}
        return architecture.from_keys({**stored, **self.config})

    @property
    def _config_key(self) -> str:
        return "model.config."

    def class_names(self) -> list[str]:
        return []  # nothing has learnt them

    def prepared_config(self, num_labels: int | None) -> Any:
        return self._adjust(self.architecture(), num_labels)

    def weights(self, config: Any, quantizer: Quantizer, dtype: torch.dtype | str, device: str) -> nn.Module:
        """The model on ``device``, packed there layer by layer.

        Drawn on the device it lies there dense before it is packed; a CPU's random numbers are not a card's.
        """
        again = partial(self._draw_dense, deepcopy(config), dtype, device)
        model = self._draw_dense(config, dtype, device)
        AdapterHooks.of(model).new_parameters = weights.beside_base(model)
        AdapterHooks.of(model).originals = lambda _, names: map(dense_weight, map(again().get_submodule, names))
        convert_model(model, quantizer, device)
        return model.to(device)  # type: ignore[no-any-return]

    def _draw_dense(self, config: Any, dtype: torch.dtype | str, device: str) -> Any:
        """The model before quantization, the same at each call."""
        wanted = torch.float32 if dtype == "auto" else dtype
        where = torch.device(device) if self.drawn_on == "device" and device != "cpu" else nullcontext()
        with torch.random.fork_rng(range(torch.cuda.device_count())), self._building(), where:
            torch.manual_seed(self.draw)
            attention = self.attention(config)
            return auto_class(self.task).from_config(config, dtype=wanted, attn_implementation=attention)


def _path(name: str) -> str:
    return str(SHIPPED_FOLDER) if name == SHIPPED else str(Path(name).expanduser())
