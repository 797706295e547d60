# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: trackhub against FLARE's own tracking and against the bare SDKs. Run ``python -m tests.bench``.

``__main__`` is the command, ``figures`` compares and judges, and five modules hold the experiments: ``process_costs``,
``journal_costs``, ``growth``, ``backend_rates`` and ``job_costs``. They stand on ``subprocesses``, ``load`` and
``flare_job``.
"""
