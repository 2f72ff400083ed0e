"""Another name of `consequentialism.backend.compiled`."""

import sys

from .backend import compiled

sys.modules[__name__] = compiled
