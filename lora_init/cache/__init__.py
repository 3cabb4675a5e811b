"""Cache statistics and decompositions in the user's cache folder, keyed by a content hash."""

from lora_init.cache.entry import Entry
from lora_init.cache.keys import fingerprint, key
from lora_init.cache.location import DEFAULT_LIMIT, default_cache
from lora_init.cache.store import Cache, Usage

__all__ = ["DEFAULT_LIMIT", "Cache", "Entry", "Usage", "default_cache", "fingerprint", "key"]
