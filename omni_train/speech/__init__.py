"""Speech: features, codecs, recognition."""
