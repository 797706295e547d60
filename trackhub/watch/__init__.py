# SPDX-License-Identifier: Apache-2.0
"""Shows the life of a running job: ``trackhub watch`` follows any job, and `show_job` the one that a script runs."""

from trackhub.watch.show_job_in_script import show_job

__all__ = ["show_job"]
