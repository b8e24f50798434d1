"""Acceptance rules, the draft-verify loop, exact replay, and the counts that tau is made of."""
