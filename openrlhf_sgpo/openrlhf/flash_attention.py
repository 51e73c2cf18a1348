"""Import OpenRLHF on machines where flash-attn cannot be built.

``openrlhf.models.ring_attn_utils`` is the only module of OpenRLHF 0.11 that imports flash_attn unconditionally, and
``openrlhf.models`` imports it. Its functions are used only with ``packing_samples``. Here that module is loaded with a
stand-in in ``sys.modules``, which is removed afterwards, so transformers and vLLM still see that flash_attn is missing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from openrlhf_sgpo import extras

_MODULE = "openrlhf.models.ring_attn_utils"


def _missing(*_args, **_kwargs):
    raise ModuleNotFoundError(extras.how_to_install("flash_attn"), name="flash_attn")


def _stand_in() -> dict[str, ModuleType]:
    names = ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")
    modules = {name: ModuleType(name) for name in names}
    for function in ("index_first_axis", "pad_input", "rearrange", "unpad_input"):
        setattr(modules["flash_attn.bert_padding"], function, _missing)
    modules["flash_attn.utils.distributed"].all_gather = _missing  # type: ignore[attr-defined]
    return modules


class _WithStandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads the one module, with the stand-in for as long as that takes."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            self.plain, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        stand_in = _stand_in()
        sys.modules.update(stand_in)
        try:
            self.plain.exec_module(module)
        finally:
            for name in stand_in:
                del sys.modules[name]


def make_optional() -> None:
    """Let ``import openrlhf.models`` work without flash_attn; does nothing if flash_attn is installed."""
    if importlib.util.find_spec("openrlhf") is None:
        raise ModuleNotFoundError(extras.how_to_install("openrlhf"), name="openrlhf")
    if importlib.util.find_spec("flash_attn") is None:
        sys.meta_path.insert(0, _WithStandIn())
