"""Text: where it comes from, how it is split, tokenised and encoded as chat."""
