# SPDX-License-Identifier: Apache-2.0
"""Tracking in a FLARE job. This is the only package of trackhub that imports nvflare.

A job's script calls `trackhub.flare.recipe`. That adds the two components, in ``sender_widget`` and
``receiver_widget``, which FLARE then runs on the server and at the sites. They stand on `trackhub.delivery`.
"""
