# SPDX-License-Identifier: Apache-2.0
"""The contract classes of the backends that come with the core."""
