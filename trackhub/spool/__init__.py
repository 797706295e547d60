# SPDX-License-Identifier: Apache-2.0
"""The site's append-only folder: its files, the writing end and the reading end."""
