"""``python -m consequentialism``."""

from .cli import main

raise SystemExit(main())
