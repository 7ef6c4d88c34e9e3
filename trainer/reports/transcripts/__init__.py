"""The transcript viewer: every rollout of a run on one page."""
