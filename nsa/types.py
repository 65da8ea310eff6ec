"""The types that public functions take, for type checkers; `contract.py` and `segments.py` say what else must hold."""

from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Int: TypeAlias = int | np.integer[Any]
AnyInt = TypeVar("AnyInt", bound=Int)  # since a list of numpy's integers is no list of `Int` to a type checker
Lengths: TypeAlias = tuple[Int, ...] | list[AnyInt] | npt.NDArray[np.integer[Any]] | torch.Tensor
