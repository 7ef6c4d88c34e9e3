"""What leaves a run: artefacts for inference servers, the commands that serve them, the proof that a server does."""
