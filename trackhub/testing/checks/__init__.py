# SPDX-License-Identifier: Apache-2.0
"""The checks of the contract kit, by what they look at. `trackhub.testing.contract` puts them into one class."""
