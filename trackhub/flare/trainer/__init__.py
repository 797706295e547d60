# SPDX-License-Identifier: Apache-2.0
"""Runs inside a trainer, and records log calls of FLARE's writers and of captured SDKs in the call itself.

`trackhub.flare.replace_log_functions` makes trainers load it. Nothing in here imports the rest of `trackhub.flare`,
since a trainer must start fast.
"""
