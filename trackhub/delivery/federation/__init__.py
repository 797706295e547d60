# SPDX-License-Identifier: Apache-2.0
"""The federation run: what a receiver that sees all sites can say of the job as a whole.

`trackhub.delivery.receiver` starts a `FederationRun`. It reads the journal like a lane, and stores its own records in
the journal like a site's. It knows nothing of FLARE or of any backend.
"""
