# SPDX-License-Identifier: Apache-2.0
"""Backends that come with the core."""
