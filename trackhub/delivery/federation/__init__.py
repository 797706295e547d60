# SPDX-License-Identifier: Apache-2.0
"""The federation run: statistics over all sites of a job, and facts about its rounds.

`trackhub.delivery.receiver` starts a `FederationRun`. It reads the journal like a lane, and stores its own records in
the journal like those of a site. It does not know FLARE or any backend.
"""
