# SPDX-License-Identifier: Apache-2.0
"""Takes what a script logs with TensorBoard's, W&B's or MLflow's own SDK, where the job asks for it (``capture=``).

`trackhub.flare.replace_log_functions` calls it in the client's process, and ``startup/sitecustomize.py`` in external
trainers: both hand over a module of an SDK when Python has loaded it. It wraps the SDK's log functions. A wrapper
writes a record, and then calls the SDK.
"""

from trackhub.flare.trainer.capture.capture import CAPTURE_ENV, Capture, CaptureSetting, capture_in_trainer

__all__ = ["CAPTURE_ENV", "Capture", "CaptureSetting", "capture_in_trainer"]
