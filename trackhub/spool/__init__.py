# SPDX-License-Identifier: Apache-2.0
"""The site's append-only folder between the processes that log and the sender.

``layout`` describes the files. Training code writes through ``writing``, the sender reads through ``reading``, and
``announcement`` brings the two together. The other modules are parts of these.
"""
