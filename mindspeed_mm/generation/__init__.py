"""Generation: options, the decoding loop over a key/value cache, and a loaded model that ties them together."""
