"""Settings that every test shares: no network, few threads, one device."""

import os

# Before anything imports huggingface_hub: a test that reaches for the network fails at once, without waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Runs are compared with those of other processes, which compute on the CPU (training_toys.environment) where
# there is a GPU, too. tests/test_training_cuda.py takes this away.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
