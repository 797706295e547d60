# SPDX-License-Identifier: Apache-2.0
"""The report page: one self-contained HTML file of one job or several.

``trackhub report`` calls `render`. `collect` reads the jobs and keeps a limited number of points of each curve.
`federation` says what the sites did together.
"""
