"""Before CUDA starts: as many hardware queues as there are, and every kernel loaded at once (a lazy load may wait)."""

import os

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
