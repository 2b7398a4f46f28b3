"""Settings that every test shares: no network, few threads, one process's files apart from another's."""

import os

# Before anything imports huggingface_hub: a test that reaches for the network fails at once, without waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
