# SPDX-License-Identifier: Apache-2.0
"""Runs the emulator as a process of its own, until its standard input is closed."""

from __future__ import annotations

import argparse
import json
import sys

from tests.support.wandb_emulator import Emulator


def main() -> None:
    """Print the address and the key, and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 chooses a free one")
    parser.add_argument("--key", default="k" * 40, help="the API key that the emulator accepts")
    given = parser.parse_args()
    with Emulator(given.key, given.port) as server:
        sys.stdout.write(json.dumps({"url": server.url, "key": given.key}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
