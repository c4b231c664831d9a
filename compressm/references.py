"""What to cite: the software, the method, and whoever introduced the layers that a model has."""

from __future__ import annotations

import re
from importlib import resources

from torch import nn

from compressm._version import __version__
from compressm.adapters import find_layers
from compressm.compression import Compressor
from compressm.errors import bad_argument

METHOD = "chahine2026compressm"
SOFTWARE = f"""@software{{compressm,
  title   = {{compressm: state-space models that grow smaller and faster while they train}},
  author  = {{{{The compressm contributors}}}},
  version = {{{__version__}}},
  year    = {{2026}},
}}
"""


def citation(*used: nn.Module | Compressor) -> None:
    """Print BibTeX of what was used: this software, the method, and the papers of the layers.

    Args:
        used: models, or the Compressors that reduced them; without any, the software and the method alone.

    Raises:
        ArgumentError: one of them is something else.
    """
    keys = [METHOD]
    for thing in used:
        model = thing.model if isinstance(thing, Compressor) else thing
        if not isinstance(model, nn.Module):
            raise bad_argument("used", got=type(thing).__name__, expected="models or Compressors")
        for _, adapter in find_layers(model, strict=False).values():
            keys += adapter.papers
    known = entries()
    print(SOFTWARE, *(known[key] for key in dict.fromkeys(keys)), sep="\n", end="")


def entries() -> dict[str, str]:
    """The entries of ``references.bib`` by their keys."""
    text = resources.files("compressm").joinpath("references.bib").read_text(encoding="utf-8")
    return {key: entry for entry, key in re.findall(r"(@\w+\{([^,]+),\n.*?\n\}\n)", text, re.DOTALL)}
