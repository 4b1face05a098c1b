"""Public benchmarks as their owners lay them out, turned into shards that `evaluate` reads."""
