# SPDX-License-Identifier: Apache-2.0
"""What may leave a site: rules of the job and of the site's operator, applied to each record before it is sent.

A job gives its rules to `trackhub.flare.recipe.add_tracking`, and the operator writes rules into
``local/trackhub.toml``. The spool keeps both, and its reader applies them (`trackhub.spool.apply_policy`).
``docs/policy.md`` is the guide.
"""

from __future__ import annotations

from trackhub.policy.rules import KINDS, Policy, SiteRules, check_kinds

__all__ = ["KINDS", "Policy", "SiteRules", "check_kinds"]
