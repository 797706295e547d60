# SPDX-License-Identifier: Apache-2.0
"""The backend that docs/writing-a-backend.md builds passes the contract kit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from trackhub.testing.checks.fixtures import QUICK_ENV

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "writing-a-backend.md"


def test_the_backend_of_the_guide_passes_the_contract(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "notes.py").write_text("\n".join(blocks), encoding="utf-8")
    (tmp_path / "test_notes.py").write_text(
        "from notes import NotesContract\n\n\nclass TestNotes(NotesContract):\n    pass\n", encoding="utf-8"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:randomly"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, QUICK_ENV: "1"}, timeout=280, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
