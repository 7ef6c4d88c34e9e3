"""What samples: vLLM, its arguments, its watch, the weights it is given and the proof that it runs them."""
