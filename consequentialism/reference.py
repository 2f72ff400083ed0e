"""Another name of `consequentialism.backend.reference`."""

import sys

from .backend import reference

sys.modules[__name__] = reference
