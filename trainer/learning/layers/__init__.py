"""What is changed of the layers of transformers' models, before the trainer reads them."""
