"""What every stage of mmkit shares: settings, runs, checkpoints, images, scores, statistics, reports.

After `import mmkit`, transformers' auto classes know mmkit's encoders, so that a LLaVA folder with one loads like any other. The modules
that define them announce themselves by entry points of the group "mmkit.models": this package imports none of its siblings. They are
loaded with transformers, not before, since that takes seconds which `mmkit --help` need not wait for.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from types import ModuleType


def register_models(whole: str = "") -> None:
    """Load every module that registers a model with transformers.

    Where one of them is what imports transformers, the others may need names that it does not have yet: it calls this again at its end.

    Args:
        whole: A module that has all its names, though its import is not over.
    """
    points = entry_points(group="mmkit.models")
    if not any(_is_being_imported(point.module) and point.module != whole for point in points):
        for point in points:
            point.load()


def _is_being_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


class _AlongWithTransformers(MetaPathFinder):
    """Calls `register_models` when transformers has been imported. Looking for it without importing (`find_spec`) calls nothing."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "transformers":
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                register_models()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


# Read when torch is loaded, so it counts where mmkit comes first, as in `mmkit ...`. OpenMP's threads spin while they wait: with as many
# threads as cores and any other busy process, small trainings became ten times slower. Not spinning at all costs up to a quarter on idle cores,
# where the next bit of work comes within microseconds: so GNU's OpenMP, which torch brings on Linux, may spin that long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# peft imports bitsandbytes wherever it is installed, and that offers a faster 4-bit kernel for this very CPU each time, model or no model.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in record.getMessage())
# peft 0.x asks transformers for a name that transformers 5 has renamed: the user can do nothing about it.
warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated", category=FutureWarning)

if "transformers" in sys.modules:
    register_models()
else:
    sys.meta_path.insert(0, _AlongWithTransformers())
