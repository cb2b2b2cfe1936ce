"""Directional Preference Alignment: one language model, steered with arithmetic."""

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from dpalign.dial.policy import Answer, Policy
    from dpalign.pipeline.run import RunResult, run

__version__ = "0.1.0"
__all__ = ["Answer", "Policy", "RunResult", "run"]

_MODULES: Final = {
    "Answer": "dpalign.dial.policy",
    "Policy": "dpalign.dial.policy",
    "RunResult": "dpalign.pipeline.run",
    "run": "dpalign.pipeline.run",
}
"""The module that defines each name. It is imported at first use, so that `import dpalign` is quick (PEP 562)."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
