"""What all tests share: the CPU unless told otherwise, and a compilation cache of their own."""

import os
import tempfile

# Before anything imports jax. `JAX_PLATFORMS=cuda,cpu pytest -m gpu` runs the tests that need a device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The commands under test keep compiled programs under the user's cache directory; tests leave that alone, and share
# theirs: compiling the same step again is most of what a test of the trainer would do.
_cache = tempfile.TemporaryDirectory(prefix="fg3dgs_jax_cache_")
# Workers of `pytest -n` inherit the first one's variables, and take a folder each: no other process writes in it.
os.environ["XDG_CACHE_HOME"] = _cache.name
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_cache.name, "xla")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
