# SPDX-License-Identifier: Apache-2.0
"""From the spool to the backends: sender's core, receiver's core, journal and lanes. Knows nothing of FLARE."""
