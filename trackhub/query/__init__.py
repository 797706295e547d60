# SPDX-License-Identifier: Apache-2.0
"""Reads what jobs left on a disk: a job's records, params, files and delivery, from its journals.

It is for scripts that look at finished or running jobs. ``trackhub export`` and ``trackhub report`` use it as well::

    with read_jobs("runs") as jobs:
        for job in jobs:
            for site in job.sites:
                for _, _, record in job.records(site):
                    print(job.name, site, record.step, record.payload)
        print(jobs.problems())  # why records may be missing
"""

from __future__ import annotations

from trackhub.query.jobs import StoredJob, StoredJobs, StoredRecord, read_jobs

__all__ = ["StoredJob", "StoredJobs", "StoredRecord", "read_jobs"]
