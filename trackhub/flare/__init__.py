# SPDX-License-Identifier: Apache-2.0
"""The FLARE side of trackhub, and the only place that imports nvflare.

`recipe` adds tracking to a job; `sender` and `receiver` are the components that it adds; `stock` takes over what
FLARE's own writers log; `compat` holds all that is not FLARE's documented interface.
"""
