"""kvenv: learn what a language model may forget.

Recorded attention drives Gymnasium environments; what agents learn there decides which tokens a
bounded KV cache keeps in ``model.generate``.
"""

from kvenv.errors import KvenvError
from kvenv.registration import register

__version__ = "0.1.0"

__all__ = ["KvenvError", "__version__", "register"]

register()
