"""Judgement: a grader maps (task, episode) to a grade. Imports neither torch nor vllm."""
