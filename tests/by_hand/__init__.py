# SPDX-License-Identifier: Apache-2.0
"""Checks that need something which no test may use, such as an account. Somebody runs them by hand."""
