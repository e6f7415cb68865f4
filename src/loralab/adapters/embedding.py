"""LoRA on an embedding: row i of the table gains scaling * (B A[:, i]), as loralib and PEFT have it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from loralab.adapters.peft import PREFIX
from loralab.quantization.base import is_linear, linear_shape


def linear_or_tokens(model: nn.Module) -> Callable[[nn.Module], bool]:
    """Whether a module of ``model`` is a linear layer or a table of its tokens. Tables of positions are none: what they
    are looked up by belongs to no row, so that trials of a pass could not be told apart."""
    try:
        tokens = getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    except NotImplementedError:  # CANINE hashes characters
        tokens = None
    return lambda module: is_linear(module) or (_is_table(module) and module.num_embeddings == tokens)


def _is_table(module: nn.Module) -> bool:
    """Whose rows are given as they are, or times its ``embed_scale`` (Gemma)."""
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return isinstance(module, nn.Embedding) and plain and module.max_norm is None


def adapted_shape(module: nn.Module) -> tuple[int, int]:
    """(width of B, width of A): (out_features, in_features), of an embedding (embedding_dim, num_embeddings)."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    return linear_shape(module)


class LoRAEmbeddingDelta(nn.Module):
    """A (r, num_embeddings) zero, B (embedding_dim, r) drawn, so that training starts at the base model. No dropout, as
    in PEFT; A of the padding token gets no gradient."""

    def __init__(self, layer: nn.Embedding, r: int, scaling: float, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self._layer = [layer]  # in a list: the base is not a submodule
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, layer.num_embeddings, device=device))
        self.lora_embedding_B = nn.Parameter(torch.empty(layer.embedding_dim, r, device=device))
        self.scaling = scaling

    @torch.no_grad()
    def draw(self, init: str, generator: torch.Generator) -> None:
        """Fills B, standard normal whatever ``init`` says of linear layers (PEFT's rule)."""
        if not self.lora_embedding_B.is_meta:
            self.lora_embedding_B.copy_(torch.randn(self.lora_embedding_B.shape, generator=generator))

    def forward(self, x: Tensor, y: Tensor, key: int | None) -> Tensor:  # ids (...), (..., dim) -> (..., dim)
        inner = embedding(x, self.lora_embedding_A.t(), self._layer[0].padding_idx)
        update = self.scaling * (inner @ self.lora_embedding_B.t())
        scale: Any = getattr(self._layer[0], "embed_scale", None)
        return (y + (update if scale is None else update * scale)).to(y.dtype)

    def delta_weight(self) -> Tensor:
        """scaling * (B A)^T, (num_embeddings, embedding_dim): what merging adds to the table."""
        return self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).t()

    def merged(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The table with the update added."""
        return {"weight": own["weight"] + self.delta_weight()}


def peft_state(adapted: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
    """{PEFT's name: A or B} of the embeddings among ``adapted``."""
    return {
        f"{PREFIX}{name}.{factor}": parameter
        for name, delta in adapted
        if isinstance(delta, LoRAEmbeddingDelta)
        for factor, parameter in delta.named_parameters()
    }
