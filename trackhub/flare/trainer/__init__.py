# SPDX-License-Identifier: Apache-2.0
"""What runs inside a trainer: FLARE's log call is taken where it is made.

`trackhub.flare.install_log_hooks` opens the way into trainers. Nothing in here imports the rest of `trackhub.flare`,
since a trainer must start fast.
"""
