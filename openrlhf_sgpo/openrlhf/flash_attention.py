"""Import OpenRLHF on machines where flash-attn cannot be built.

``openrlhf.models.ring_attn_utils`` is the only module of OpenRLHF 0.11 that imports flash_attn unconditionally, and
``openrlhf.models`` imports it. Its functions are used only with ``packing_samples``. Here that module is loaded with a
stand-in in ``sys.modules``, which is removed afterwards, so transformers and vLLM still see that flash_attn is missing.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

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


def make_optional() -> None:
    """Let ``import openrlhf.models`` work without flash_attn; does nothing if flash_attn is installed."""
    if _MODULE in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        return
    package = importlib.util.find_spec("openrlhf")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(extras.how_to_install("openrlhf"), name="openrlhf")
    path = os.path.join(os.path.dirname(package.origin), "models", "ring_attn_utils.py")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    stand_in = _stand_in()
    sys.modules.update(stand_in)
    sys.modules[_MODULE] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_MODULE]
        raise
    finally:
        for name in stand_in:
            del sys.modules[name]
