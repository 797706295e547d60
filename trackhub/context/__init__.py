# SPDX-License-Identifier: Apache-2.0
"""Facts about how a run was made: versions, the kind of machine, the script's git commit and its command line.

`trackhub.flare` asks for them once per job and site, and logs them as params and tags. Nothing here knows FLARE, and
nothing here adds a host name, a user name or an address.
"""
