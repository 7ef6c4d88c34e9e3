"""Worlds and vocabulary: tasks, tools, episodes. Imports neither torch nor vllm."""
