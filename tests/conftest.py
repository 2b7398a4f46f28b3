"""Settings of every test: no network, nothing of the user's, few threads, one device, no deadlines."""

import atexit
import os
import shutil
import tempfile

import hypothesis

# Before anything imports huggingface_hub: a test that reaches for the network fails at once, without waiting.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Runs are compared with those of other processes, which compute on the CPU (training_toys.environment) where
# there is a GPU, too. tests/test_training_cuda.py takes this away.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
# What lies in the user's cache, as GPT-2's tokenizer may, would be found where a test wants nothing to be.
for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN", "HF_TOKEN_PATH"):
    os.environ.pop(name, None)
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# In CI a property is tried on the same examples each time: a change is judged by what it changes.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")
