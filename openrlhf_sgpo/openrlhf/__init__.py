"""The only package that imports OpenRLHF, and the only one that adapts it to machines without CUDA.

Its names are imported when one of them is asked for.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from openrlhf_sgpo.openrlhf.flash_attention import make_optional

if TYPE_CHECKING:
    from openrlhf_sgpo.openrlhf.for_trainers import *  # noqa: F403

make_optional()

# For scripts of OpenRLHF's users; a run would load ``datasets`` and pandas with them in vain.
_FOR_SCRIPTS = {"DPOTrainer": "openrlhf.trainer.dpo_trainer", "RewardDataset": "openrlhf.datasets"}


def __getattr__(name: str) -> Any:
    # Python asks for a submodule that is not yet imported too, and imports it when it hears that there is no such attribute.
    if name.startswith("__") or find_spec(f"{__name__}.{name}"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FOR_SCRIPTS.get(name, f"{__name__}.for_trainers")), name)
