# SPDX-License-Identifier: Apache-2.0
"""The site's append-only folder between the processes that log and the sender.

``layout`` describes the files. Training code writes through ``writing``, the sender reads through ``reading``, and
``announce_spool`` tells training code which spool is its own. The other modules are parts of these.
"""
