# SPDX-License-Identifier: Apache-2.0
"""Contract classes of the backends that come with the core."""
