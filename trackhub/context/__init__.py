# SPDX-License-Identifier: Apache-2.0
"""What a run was made with: versions, the kind of machine, the script's git commit, its command line without secrets.

`trackhub.flare` asks for it once per job and site, and logs it as params and tags. Nothing here knows FLARE. It
adds no host name, user name or address.
"""
