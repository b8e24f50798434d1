"""Acceptance rules, exact replay, and the counts that tau is made of."""
