# SPDX-License-Identifier: Apache-2.0
"""Loggers and callbacks for trainers: Lightning, Hugging Face, Accelerate, XGBoost, LightGBM and Keras.

Training code imports the module of its own trainer, which must be installed. Each module calls `trackhub.Writer`, so
what a trainer logs goes to every backend of the job. None of them ends the run: a federated job may train many times.
"""
