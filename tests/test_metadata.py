"""What a package index shows of the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
from email import message_from_string
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAKE = "from setuptools import build_meta; import sys; print(build_meta.prepare_metadata_for_build_wheel(sys.argv[1]))"


def test_metadata_is_whole_and_names_no_file_beside_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAKE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / done.stdout.split()[-1]
    metadata = message_from_string((folder / "METADATA").read_text())
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Author"] == "consequentialism developers"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Requires-Python"] == ">=3.10"
    assert not any("License ::" in classifier for classifier in metadata.get_all("Classifier"))
    text = metadata.get_payload()
    assert "pip install" in text
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert all(link.startswith("http") for link in links), links
    assert "![" not in text
