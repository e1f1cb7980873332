"""Makes packed folders: images stored small in shards, with an index."""
