"""The tested library: data, models, objectives, one training loop; recipes build on it."""
