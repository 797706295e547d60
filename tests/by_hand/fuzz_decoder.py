# SPDX-License-Identifier: Apache-2.0
"""By hand: hand changed bytes to the decoder and the gate until one of them breaks its word, guided by coverage.

It needs `atheris` (``pip install atheris``), which is no dependency of trackhub::

    python -m tests.by_hand.fuzz_decoder CORPUS -max_total_time=600

CORPUS is a folder, where it starts from real requests and keeps what reaches new code. What it finds goes as a case
into `tests/hostile/test_decoder.py`, which checks the same.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    """Write the first requests into the corpus, and run until the time is over or something is wrong."""
    atheris = importlib.import_module("atheris")

    with atheris.instrument_imports(include=["trackhub"]):
        from tests.hostile.decoder_rules import check_decoder, real_bodies, real_requests

    corpus = Path(argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, request in enumerate([*real_requests(), *real_bodies()]):
        (corpus / f"real-{number}").write_bytes(request)
    atheris.Setup(argv, check_decoder)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
