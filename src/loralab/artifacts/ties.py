"""Weights that several layers of a base share: which of them a merge changes, and what its config then says."""

import inspect
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import nn


class Ties:
    """The names under which each parameter of a model is known."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)

    def follow(self, changed: MutableMapping[str, nn.Parameter]) -> bool:
        """Adds to ``changed`` the other names of its parameters that no layer computes with (BERT's head keeps its
        decoder's bias under one). Returns whether a layer is left that computes with another value than the one that it
        shared a parameter with."""
        untied = False
        for name in list(changed):
            new = changed[name]  # perhaps that of a layer before it
            for other in self.names[id(self.model.get_parameter(name))]:
                if other == name:
                    continue
                if other in changed and not torch.equal(changed[other], new):
                    untied = True
                elif other in changed or list(self.model.get_submodule(other.rpartition(".")[0]).children()):
                    changed[other] = new
                else:
                    untied = True
        return untied


def untie_config(model: nn.Module, config: Any) -> None:
    """Makes ``config`` say that ``model`` ties nothing, where its class lets it and computes the same without.

    T5's does neither: it says that they are tied whatever is stored, and transformers then ties no two tensors that
    differ in the files.
    """
    forced = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False}).tie_word_embeddings
    if forced or "tie_word_embeddings" in inspect.getsource(type(model).forward):  # T5's kin scale tied logits
        return
    for one in {id(one): one for one in (config, config.get_text_config())}.values():
        one.tie_word_embeddings = False
