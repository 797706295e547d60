# SPDX-License-Identifier: Apache-2.0
"""The report page: one self-contained HTML file of one job or several.

``trackhub report`` calls `render`. `collect` reads the jobs into few points, `federation` says what the sites did
together.
"""
