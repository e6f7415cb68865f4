"""A buffer in float32 and its shadow, a copy in the dtype of products: one cast for all parameters that lie in it."""

from collections.abc import Sequence
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

ALIGNED = 16  # bytes, where products are quick, and grouped ones possible at all


class Shadowed:
    """While it lives, ``in_dtype`` gives views of one copy of ``values``, contiguous, of which ``parts`` are views.

    The copy is made anew once anything has changed a part or the values in place, and at each pass besides: what is
    done by way of ``.data``, as some callbacks exchange weights, leaves no trace. Whoever holds a view of a former copy
    keeps its numbers.
    """

    passes: ClassVar[int] = 0
    _of_storage: ClassVar["WeakValueDictionary[int, Shadowed]"] = WeakValueDictionary()

    def __init__(self, values: Tensor, parts: Sequence[Tensor]) -> None:
        self.values, self.parts = values, parts
        self._copy: Tensor | None = None
        self._stamp: tuple[object, ...] = ()
        self._places = {part.storage_offset(): place for place, part in enumerate(parts)}
        self._versions: list[int] = []  # of each part: how often it had been changed
        self._of_storage[values.untyped_storage()._cdata] = self

    @classmethod
    def begin_pass(cls) -> None:
        """From now on no copy that was made before is given."""
        cls.passes += 1

    @classmethod
    def over(cls, tensor: Tensor) -> "Shadowed | None":
        """That whose values ``tensor`` is a view of, if any."""
        return cls._of_storage.get(tensor.untyped_storage()._cdata)

    def copy(self, dtype: torch.dtype, parts: Sequence[Tensor]) -> Tensor:
        """The values in ``dtype``, those of ``parts`` as they are now."""
        stamp = (self.passes, self.values._version, dtype)
        if self._copy is None or self._stamp != stamp or any(map(self._changed, parts)):
            self.forget()  # so that there are not two
            with torch.inference_mode(False), torch.no_grad():  # a validation's copy may be used for training
                self._copy = self.values.to(dtype)
            self._stamp, self._versions = stamp, [part._version for part in self.parts]
        return self._copy

    def forget(self) -> None:
        """Frees the copy, unless a graph holds it: nothing is computed with it before the next pass."""
        self._copy = None

    def _changed(self, part: Tensor) -> bool:
        return self._versions[self._places[part.storage_offset()]] != part._version


def in_dtype(tensor: Tensor, dtype: torch.dtype, parts: Sequence[Tensor]) -> Tensor:
    """``tensor``, which is one of ``parts`` or a view over them, in ``dtype``: where they lie in a shadowed buffer, a
    view of its shadow, not to be written to."""
    if tensor.dtype == dtype:
        return tensor
    if torch.compiler.is_compiling() or (owner := Shadowed.over(tensor)) is None or not _aligned(tensor, dtype):
        return tensor.to(dtype)
    return owner.copy(dtype, parts).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _aligned(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether it begins, and each of its matrices, at a multiple of ALIGNED bytes in ``dtype``."""
    unit = ALIGNED // dtype.itemsize
    return tensor.storage_offset() % unit == 0 and all(step % unit == 0 for step in tensor.stride()[:-2])
